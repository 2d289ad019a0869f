"""Train a detector or a classifier: the entry point behind dist_train.sh and slurm_train.sh."""

import argparse
import sys

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.datasets.evaluation import use_evaluated_data_hook
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.reading import check_fit
from mmdet_lors.engine.checkpoint.safe_loading import hand_over
from mmdet_lors.engine.config_check import check_config, check_operators
from mmdet_lors.engine.launch import add_common_options, is_first_process, load_config, run
from mmdet_lors.engine.machine import use_device
from mmdet_lors.engine.processes.stop import Stopped, stop_at_once
from mmdet_lors.engine.resume.start import choose_start, faults_in_one_line, how_to_go_on, make_resumable
from mmdet_lors.errors import UserError


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a detector or a classifier.")
    add_common_options(parser)
    parser.add_argument(
        "--amp",
        nargs="?",
        const="auto",
        choices=["auto", "float16", "bfloat16"],
        help="mixed precision; auto is float16 with loss scaling on a CUDA GPU, bfloat16 elsewhere",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate from the config's base batch size to the actual one",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint, or from the newest one in the work folder when none is given",
    )
    return parser.parse_args()


def use_amp(cfg: Config, dtype: str) -> None:
    """Switch the optimizer wrapper to mixed precision.

    Raises:
        UserError: float16 without a CUDA GPU.
    """
    if get_device() == "cuda":
        dtype = "float16" if dtype == "auto" else dtype
        cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype=dtype, loss_scale="dynamic")
    elif dtype == "float16":
        raise UserError(f"--amp float16 needs a CUDA GPU; device {get_device()} trains with --amp bfloat16")
    else:
        cfg.optim_wrapper.update(type="CPUAmpOptimWrapper")


def prepare(args: argparse.Namespace) -> Config:
    """The config of the run, once it, its inputs and the checkpoint that it starts from have been checked."""
    cfg = load_config(args.config, args.cfg_options, args.launcher, args.work_dir)
    if args.amp:
        use_amp(cfg, args.amp)
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    if is_first_process():
        check_config(cfg, ("train", "val", "test"))
    make_resumable(cfg)
    use_evaluated_data_hook(cfg)

    if is_first_process():
        check_inputs(cfg, ("train", "val"))
        model = build_without_weights(cfg.model)
        check_operators(model, cfg.model, get_device(), training=True)
    start = choose_start(cfg, args.resume)
    if start.checkpoint is not None:
        if is_first_process():
            check_fit(model, start.checkpoint, start.path, partly=not start.resume)
        hand_over(start.path, start.checkpoint)
    return cfg


def train(args: argparse.Namespace) -> None:
    """Check the inputs, then hand over to mmengine's runner."""
    cfg = prepare(args)
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    runner.train()


def main() -> None:
    """Train; SIGTERM stops the run after an iteration, with exit status 0."""
    args = parse_args()
    use_device(args.device, args.launcher)
    try:
        stop_at_once()
        with faults_in_one_line():
            train(args)
    except Stopped as stop:
        if is_first_process():
            saved = f"saved {stop.checkpoint}" if stop.checkpoint else "training had not begun"
            print(f"stopped by SIGTERM, {saved}; resume with: {how_to_go_on(args, sys.argv)}", flush=True)


if __name__ == "__main__":
    run(main)
