"""What tools/train.py does: check a run's config, its inputs and where it starts from, then train."""

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
from mmdet_lors.engine.launch import is_first_process, load_config
from mmdet_lors.engine.machine import use_device
from mmdet_lors.engine.parameter_groups import merge_groups
from mmdet_lors.engine.processes.stop import Stopped, stop_at_once
from mmdet_lors.engine.resume.start import choose_start, faults_in_one_line, how_to_go_on, make_resumable
from mmdet_lors.errors import UserError


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
    merge_groups(cfg, start.checkpoint if start.resume else None)
    if start.checkpoint is not None:
        if is_first_process():
            check_fit(model, start.checkpoint, start.path, partly=not start.resume)
        hand_over(start.path, start.checkpoint)
    return cfg


def train(args: argparse.Namespace) -> None:
    """Check the inputs, then hand over to mmengine's runner; SIGTERM stops the run after an iteration."""
    use_device(args.device, args.launcher)
    try:
        stop_at_once()
        with faults_in_one_line():
            cfg = prepare(args)
            runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
            runner.train()
    except Stopped as stop:
        if is_first_process():
            saved = f"saved {stop.checkpoint}" if stop.checkpoint else "training had not begun"
            print(f"stopped by SIGTERM, {saved}; resume with: {how_to_go_on(args, sys.argv)}", flush=True)
