#!/usr/bin/env bash
# Sets up what this repository runs in: .venv with the versions of requirements.txt, mmcv built against the torch in it,
# and mmdet_lors itself (editable). Run it as often as you like: it ends at once when nothing changed.
#
# Usage: bash tools/setup_env.sh [--no-venv] [--print-python]
#   --no-venv       use the active environment's python: what is there and satisfies setup.py stays, the rest is added
#   --print-python  print the path of the environment's python on stdout (messages go to stderr), for scripts:
#                       PY=$(bash tools/setup_env.sh --print-python)
#
# Settings (environment variables):
#   PYTHON              interpreter for a new .venv; default: the first that works of python3.11, python3.12, python3.10
#                       and python3
#   MMDET_LORS_VENV     where the environment lives; default: .venv in the repository
#   MMDET_LORS_CACHE    built mmcv wheels and logs; default: mmdet_lors under XDG_CACHE_HOME or ~/.cache
#   MMDET_LORS_DISK_GB  free space that a first set-up insists on; default: 12
#   MMCV_CUDA           1 or 0: build mmcv's CUDA operators or not; default: 1 where nvcc and a GPU are there
#   MAX_JOBS, CFLAGS    parallel compilers (default: one per core, and per 2 GB of memory); their flags (default: -O1 -g0)
set -euo pipefail

if [[ $OSTYPE != linux* ]]; then
  echo "setup: this script needs Linux; docs/compatibility.md says what to install on $OSTYPE" >&2
  exit 1
fi

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MMDET_LORS_VENV=${MMDET_LORS_VENV:-$(dirname "$tools")/.venv}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
version() { "$1" -c 'import platform; print("Python", platform.python_version())' 2>/dev/null || echo "not there"; }

candidates=("$MMDET_LORS_VENV/bin/python" python3.11 python3.12 python3.10 python3)
if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
for argument in "$@"; do
  case $argument in
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    --no-venv) candidates=(python python3) ;;
  esac
done

# A name on PATH may be a shim that fails when it is run, so each is tried by running it.
for python in "${candidates[@]}"; do
  if supported "$python"; then exec "$python" "$tools/setup_env.py" "$@"; fi
done
python=${candidates[-1]}
echo "setup: Python 3.10 to 3.12 is needed, $python is $(version "$python"): install one or set PYTHON=/path/to/it" >&2
exit 1
