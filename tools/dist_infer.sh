#!/usr/bin/env bash
# Detect in many images with one process per GPU, on one machine or several; without a GPU, GPUS counts processes.
#   bash tools/dist_infer.sh INPUT CONFIG CHECKPOINT GPUS [arguments of tools/infer.py]
# launch/dist.sh lists the environment variables: NNODES, NODE_RANK, MASTER_ADDR, PORT and more.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [[ $# -lt 4 ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    [[ ${1-} == -h || ${1-} == --help ]] && exit 0 || exit 2
fi
source "$here/launch/dist.sh"
input=$1 config=$2 checkpoint=$3 gpus=$4
shift 4
launch "$gpus" "$here/infer.py" "$input" "$config" "$checkpoint" "$@"
