#!/usr/bin/env bash
# Sets up the environment (tools/setup_env.sh has the settings), then runs the tests.
#
# Usage: bash tools/run_tests.sh [--no-venv] [--every-config | pytest arguments]
#   no arguments    all tests, in up to 4 processes; they train, resume and test one config of every base
#   --every-config  all tests, and every config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup=()
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
if [[ ${1:-} == --no-venv ]]; then setup=(--no-venv) && shift; fi

python=$(bash tools/setup_env.sh --print-python "${setup[@]}")
# The threads of several processes would slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Files in their own order, not those with the most tests first, so that the longest, the runs of configs, start early.
all=(-n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder --durations=20 tests)
if [[ $# == 0 ]]; then set -- "${all[@]}"; elif [[ $* == --every-config ]]; then set -- "${all[@]}" --every-config; fi
exec "$python" -m pytest "$@"
