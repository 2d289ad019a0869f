#!/usr/bin/env bash
# Train with one process per GPU, on one machine or several; without a GPU, GPUS counts processes on the CPU.
#   bash tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# launch/dist.sh lists the environment variables: NNODES, NODE_RANK, MASTER_ADDR, PORT and more.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [[ $# -lt 2 ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    [[ ${1-} == -h || ${1-} == --help ]] && exit 0 || exit 2
fi
source "$here/launch/dist.sh"
config=$1 gpus=$2
shift 2
launch "$gpus" "$here/train.py" "$config" "$@"
