# Sourced by slurm_train.sh and slurm_test.sh: one srun task per GPU.
#
# Settings, all optional, by environment variable:
#   GPUS           number of GPUs in total                      (8)
#   GPUS_PER_NODE  GPUs of each machine                         (8)
#   CPUS_PER_TASK  cores of each process                        (5)
#   SRUN_ARGS      further arguments of srun                    ()
#   PYTHON         the interpreter                              (python)

# submit PARTITION JOB_NAME SCRIPT [ARGUMENTS]
submit() {
    local partition=$1 job=$2
    shift 2
    command -v srun >/dev/null || { echo "error: srun not found: run this on a slurm machine" >&2; exit 1; }
    # shellcheck disable=SC2086  # SRUN_ARGS is a list of words
    exec srun -p "$partition" --job-name="$job" \
        --gres="gpu:${GPUS_PER_NODE:-8}" \
        --ntasks="${GPUS:-8}" \
        --ntasks-per-node="${GPUS_PER_NODE:-8}" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} \
        "${PYTHON:-python}" -u "$@" --launcher slurm
}
