# Sourced by dist_train.sh, dist_test.sh and dist_infer.sh: torchrun over all processes of this machine.
#
# Settings, all optional, by environment variable:
#   NNODES       machines in the run                            (1)
#   NODE_RANK    this machine's number, from 0                  (0)
#   MASTER_ADDR  address of machine 0                           (127.0.0.1)
#   PORT         a free port on machine 0                       (29500)
#   MAX_RESTARTS how often to restart after a failure; training resumes from its newest checkpoint   (0)
#   PYTHON       the interpreter                                (python)
#   OMP_NUM_THREADS  threads of each process                    (cores / processes)

# launch PROCESSES SCRIPT [ARGUMENTS]
launch() {
    local processes=$1 threads
    shift
    [[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS must be a positive number, got '$processes'" >&2; exit 2; }
    threads=$(($(nproc 2>/dev/null || echo 1) / processes))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/torchrun.py" \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${PORT:-29500}" \
        --nproc_per_node="$processes" \
        --max_restarts="${MAX_RESTARTS:-0}" \
        "$@" --launcher pytorch
}
