#!/usr/bin/env bash
# Evaluate with one process per GPU, on one machine or several; without a GPU, GPUS counts processes on the CPU.
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# launch/dist.sh lists the environment variables: NNODES, NODE_RANK, MASTER_ADDR, PORT and more.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [[ $# -lt 3 ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    [[ ${1-} == -h || ${1-} == --help ]] && exit 0 || exit 2
fi
source "$here/launch/dist.sh"
config=$1 checkpoint=$2 gpus=$3
shift 3
launch "$gpus" "$here/test.py" "$config" "$checkpoint" "$@"
