#!/usr/bin/env bash
# From nothing to a trained and evaluated AdaMixer+LORS: sets up the environment, makes the digits data set, trains,
# evaluates, draws, and prints a summary. On two CPU cores: set-up about 8 minutes, training 7 to 13.
#
# Usage: bash tools/quickstart.sh [--no-venv]
#   --no-venv  use the active environment (see tools/setup_env.sh)
#
# Settings (environment variables):
#   CONFIG    what to train                (configs/lors/adamixer-lors_r18_digits.py)
#   WORK_DIR  folder for all output except data/digits   (work_dirs/quickstart)
#   GPUS      number of processes          (all GPUs, or 1 on the CPU)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1-} in
-h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' tools/quickstart.sh && exit ;;
esac

CONFIG=${CONFIG:-configs/lors/adamixer-lors_r18_digits.py}
WORK_DIR=${WORK_DIR:-work_dirs/quickstart}
PYTHON=$(bash tools/setup_env.sh --print-python "$@")
export PYTHON
GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

"$PYTHON" tools/dataset_converters/digits_to_coco.py

begin=$SECONDS
bash tools/dist_train.sh "$CONFIG" "$GPUS" --work-dir "$WORK_DIR"
training_seconds=$((SECONDS - begin))

"$PYTHON" tools/test.py "$CONFIG" "$(<"$WORK_DIR/last_checkpoint")" --work-dir "$WORK_DIR/test" \
    --metrics "$WORK_DIR/metrics.json" --show-dir pictures --show-interval 10
"$PYTHON" tools/analysis_tools/run_summary.py "$CONFIG" "$WORK_DIR" --training-seconds "$training_seconds"
