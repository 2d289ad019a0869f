#!/usr/bin/env bash
# Sets up what this repository runs in: .venv with the versions of requirements.txt, mmcv built against the torch in it,
# and mmdet_lors itself (editable). Run it as often as you like: it ends at once when nothing changed.
#
# Usage: bash tools/setup_env.sh [--no-venv] [--print-python]
#   --no-venv       use the active environment's python: what is there and satisfies setup.py stays, the rest is added
#   --print-python  print the path of the environment's python on stdout; messages go to stderr
#
# Settings (environment variables), besides those of uv, which does the work, and those of pip, which uv is told:
#   PYTHON              path or version of a new .venv's Python; default: the first from 3.10 to 3.13
#   MMDET_LORS_VENV     where the environment lives; default: .venv in the repository
#   MMDET_LORS_CACHE    mmcv as built for each torch, uv if it is not on PATH, the log; default: ~/.cache/mmdet_lors
#   MMCV_CUDA           1 or 0: build mmcv's CUDA operators or not; default: 1 where a GPU and torch's nvcc are there
#   MAX_JOBS, CFLAGS    parallel compilers (default: one per core); their flags (default: -O1 -g0)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MMDET_LORS_VENV:-$root/.venv} cache=${MMDET_LORS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmdet_lors}
log=$cache/setup.log python=$venv/bin/python own=1 print=
say() { echo "setup: $*" >&2; }
fail() { say "$@" && exit 1; }
# run WHAT COMMAND...: says what it downloads and every tenth file that it compiles; if it fails, why, in one line.
run() {
  local what=$1 why && shift && say "$what"
  if "$@" 2>&1 | tee "$log" | sed -un 's/.*\[\([0-9]*0\/[0-9]*\)\] .*/setup:   \1 files compiled/p
    s/^Downloading \(.* ([0-9]\{3,\}.*MiB)\)$/setup:   downloading \1/p' >&2; then return; fi
  why=$(grep -m1 -oE 'No space left on device|apt install .*|Killed signal.*|[^/ ]+:[0-9:]+ (fatal )?error: .*' "$log" ||
    sed -n '/^error: /{s///;N;s/\n *cause//;p;q}' "$log")
  [[ $why != Killed* ]] || why="out of memory, try MAX_JOBS=1"
  fail "${what#*] }: ${why:-$(tail -n1 "$log")} (log: $log)"
}

# uv from PATH, or installed by pip; the indexes, constraints and certificates that pip is told of hold for uv too.
find_uv() {
  uv=$(command -v uv) && return || uv=$cache/uv/bin/uv
  [[ -x $uv ]] || { run "[1/4] uv" python3 -m venv --clear "$cache/uv" && run "[1/4] uv" "$cache/uv/bin/pip" install uv; }
  while IFS== read -r key value; do
    value=${value//\'/}
    case ${key##*.} in
      index-url) export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX-$value} ;;
      extra-index-url) export UV_INDEX=${UV_INDEX-$value} UV_INDEX_STRATEGY=unsafe-best-match ;;
      find-links) export UV_FIND_LINKS=${UV_FIND_LINKS-${value// /,}} ;;
      constraint) export UV_CONSTRAINT=${UV_CONSTRAINT-$value} ;;
      cert) export SSL_CERT_FILE=${SSL_CERT_FILE-$value} ;;
    esac
  done < <("$cache/uv/bin/pip" config list)
}

# Where the packages of $python lie; nothing if it does not run.
find_site() { site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))' 2>/dev/null) || site=; }
torch() { sed -n "s/^$1[^=]*= *'\(.*\)'.*/\1/p" "$site/torch/version.py"; } # torch cuda: 13.0

# What to build mmcv's CUDA operators for, like 8.0;9.0, or nothing. torch refuses the nvcc of another CUDA than its own.
cuda_archs() {
  local gpus nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
  gpus=$({ nvidia-smi --query-gpu=compute_cap --format=csv,noheader || true; } 2>/dev/null | sort -u | paste -sd';')
  nvcc=$("$(command -v "$nvcc" || echo nvcc)" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p') || nvcc=none
  if [[ ${MMCV_CUDA-} == 1 || -z ${MMCV_CUDA-} && $gpus && $(torch cuda) == "$nvcc".* ]]; then
    echo "${TORCH_CUDA_ARCH_LIST:-${gpus:-8.0;9.0}}"
  fi
}

# Equal to the stamp when nothing changed since the last set-up: what is asked for, and what of it is installed.
inputs() { { echo "$root" && cat "$root/requirements.txt" "$root/setup.py"; } | sha256sum; }
state() { inputs && { cat "$site/torch/version.py" "$site"/mmcv-*/RECORD && cuda_archs; } 2>/dev/null | sha256sum; }

# uv keeps what it built by mmcv's version alone, so that each torch, Python and kind of GPU gets a cache of its own.
install_mmcv() {
  local key install source= archs=$(cuda_archs) mmcv=$(grep '^mmcv==' "$root/requirements.txt")
  if [[ ! $own ]] && "$python" -c "import mmcv, mmcv.ops as ops
assert '2.0' <= mmcv.__version__ < '2.2' and (not '$archs' or ops.get_compiling_cuda_version() != 'not available')" \
    &>/dev/null; then return; fi
  key=$cache/${mmcv/==/-}-torch-$(torch __version__)-$("$python" -c 'import sys; print(sys.implementation.cache_tag)')
  key+=${archs:+-cuda-${archs//;/-}}
  install=(pip install --python "$python" --cache-dir "$key" --reinstall --no-deps --no-build-isolation "$mmcv")
  if [[ $(find "$key" -path '*/mmcv/*.whl' 2>/dev/null) ]] && "$uv" --offline "${install[@]}" &>"$log"; then return; fi
  export PATH=${python%/*}:$PATH MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} CFLAGS=${CFLAGS:--O1 -g0}
  if [[ $archs ]]; then export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$archs; else export CUDA_VISIBLE_DEVICES=; fi
  # From Python 3.13, its setup.py does not find its version: mended in the source, which a try without compiler leaves.
  [[ $key != *cpython-313* ]] || CC=false CXX=false "$uv" "${install[@]}" &>"$log" || source=$(
    find "$key" -path '*/mmcv/*/setup.py' -print -exec sed -i "s/'exec'))$/'exec'), globals())/; s/locals()\['/globals()['/" {} +)
  run "[3/4] $mmcv from source on $MAX_JOBS cores: 11 core-minutes${archs:+, CUDA operators half an hour}" \
    "$uv" ${source:+--offline} -v "${install[@]}"
}

set_up() {
  compgen -G "$cache/mmcv-*" >/dev/null || command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler (${CXX:-c++}), mmcv cannot be built: apt-get install g++"
  # uv leaves compiling to each package's first import, and Python does not keep it with PYTHONDONTWRITEBYTECODE.
  export UV_COMPILE_BYTECODE=${UV_COMPILE_BYTECODE-1}
  mkdir -p "$cache" && exec 9>"$cache/lock"
  flock -n 9 || { say "another set-up is running, waiting for it" && flock 9; }
  find_uv
  [[ $site ]] || run "[1/4] $venv" "$uv" venv --seed --clear --python "${PYTHON:->=3.10,<3.14}" "$venv"
  find_site
  # With unchanged inputs, a torch that the user chose stays: it gets its mmcv, and not the pin back.
  if [[ $(head -n1 "$site/mmdet_lors.stamp" 2>/dev/null) != "$(inputs)" ]]; then
    echo "mmcv; sys_platform == 'none'" >"$cache/without-mmcv.txt"
    local packages=(-e "$root" -r "$root/requirements.txt")
    [[ $own ]] || packages=(-e "$root[tests]" "setuptools>=64,<81" wheel ninja) # the last three build mmcv
    run "[2/4] torch and all else but mmcv: up to 3 GB to download, about 2 minutes on a fast network" \
      "$uv" pip install --python "$python" --override "$cache/without-mmcv.txt" "${packages[@]}"
  fi
  install_mmcv
  [[ $("$python" -c "import cv2" 2>&1) != *"cannot open shared object"* ]] ||
    run "[4/4] OpenCV that needs no display" "$uv" pip install --python "$python" --reinstall --no-deps opencv-python-headless
  run "[4/4] a look whether mmdet imports" "$python" -c "import mmcv.ops, mmdet"
  state >"$site/mmdet_lors.stamp" || true
  say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $python"
}

for argument; do case $argument in
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    --no-venv) own= && python=$(command -v python || command -v python3) || fail "there is no python on PATH" ;;
    --print-python) print=1 ;;
    *) fail "$argument is not an option, see --help" ;;
esac; done
[[ $OSTYPE == linux* ]] || fail "this script needs Linux; docs/compatibility.md says what to install on $OSTYPE"
trap 'say "interrupted: run it again to go on"; exit 130' INT TERM
find_site
if [[ $(state) == "$(cat "$site/mmdet_lors.stamp" 2>/dev/null)" ]]; then say "$python is up to date"; else set_up; fi
[[ ! $print ]] || echo "$python"
