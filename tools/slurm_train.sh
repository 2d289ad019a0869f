#!/usr/bin/env bash
# Train on a slurm cluster, one process per GPU.
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]
# launch/slurm.sh names the environment variables: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS, PYTHON.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [[ $# -lt 3 ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    [[ ${1-} == -h || ${1-} == --help ]] && exit 0 || exit 2
fi
source "$here/launch/slurm.sh"
partition=$1 job=$2
shift 2
submit "$partition" "$job" "$here/train.py" "$@"
