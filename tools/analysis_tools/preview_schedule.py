"""Preview a config's schedule: learning rate and momentum at every iteration, before anything is trained.

mmengine's own schedulers run on an optimizer of one dummy parameter, stepped as in mmengine's training loop. The length
of an epoch comes from the data set (with --gpus and the config's batch size), or from --iterations-per-epoch, which
needs no data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--iterations-per-epoch", type=int, metavar="N", help="length of an epoch, instead of reading the data set"
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes that share the data (default: %(default)s)")
    parser.add_argument("--auto-scale-lr", action="store_true", help="as in tools/train.py, for --gpus processes")
    parser.add_argument(
        "--at",
        nargs="+",
        type=int,
        metavar="ITERATION",
        help="print these iterations (default: where a scheduler begins or ends, and milestones)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write: .png, .pdf or .svg")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS
from torch import nn

from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.analysis.output import console, save_figure
from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError


class Schedule(NamedTuple):
    """The optimizer's settings at every iteration, counted from 0."""

    lr: list[float]
    momentum: list[float]
    """Momentum, or Adam's beta_1."""
    iterations_per_epoch: int | None
    """None if training is by iterations."""
    turns: list[int]
    """Iterations at which a scheduler begins, ends or has a milestone."""


def iterations_per_epoch(cfg: Config, gpus: int) -> int:
    """Iterations of one epoch on each of ``gpus`` processes, as mmengine's samplers and loaders count them.

    Raises:
        UserError: the config has no training data, or it does not exist on this machine.
    """
    loader = cfg.get("train_dataloader")
    if not loader:
        raise UserError(f"config {cfg.filename} has no train_dataloader; give --iterations-per-epoch")
    try:
        # Without the model: its weights are not needed here.
        check_inputs(Config(dict(model={}, train_dataloader=loader.to_dict())), ("train",))
    except UserError as error:
        raise UserError(f"{error}; or give --iterations-per-epoch, which needs no data") from error
    images = len(DATASETS.build(loader.dataset))
    per_process = -(-images // gpus)
    if loader.get("drop_last"):
        return per_process // loader.batch_size
    return -(-per_process // loader.batch_size)


def _turns(scheduler: dict, epoch: int | None) -> list[int]:
    """Iterations at which this scheduler's rule changes."""
    length = epoch if scheduler.get("by_epoch", True) else 1
    marks = [scheduler.get("begin", 0), scheduler["end"], *scheduler.get("milestones", [])]
    return [mark * length for mark in marks if length]


def preview(cfg: Config, epoch: int | None, lr_scale: float = 1.0) -> Schedule:
    """Run the schedulers of a config over a whole training.

    Args:
        cfg: with ``optim_wrapper``, ``param_scheduler`` and ``train_cfg``.
        epoch: iterations of one epoch; may be None if nothing is by epochs.
        lr_scale: factor on the optimizer's learning rate (``auto_scale_lr``).

    Raises:
        UserError: a field that is missing, does not fit, or needs ``epoch``.
    """
    for field in ("optim_wrapper", "train_cfg"):
        if not cfg.get(field):
            raise UserError(f"config {cfg.filename} has no {field}: it trains nothing")
    if "optimizer" not in cfg.optim_wrapper:
        raise UserError("optim_wrapper.optimizer is missing: several optimizers cannot be previewed")
    by_epoch = "max_epochs" in cfg.train_cfg
    total = cfg.train_cfg.get("max_epochs") or cfg.train_cfg.get("max_iters")
    if not total:
        raise UserError("train_cfg has neither max_epochs nor max_iters")
    schedulers = cfg.get("param_scheduler") or []
    schedulers = [schedulers] if isinstance(schedulers, dict) else list(schedulers)
    if epoch is None and (by_epoch or any(s.get("convert_to_iter_based") for s in schedulers)):
        raise UserError("this schedule is by epochs; give --iterations-per-epoch")
    iterations = total * epoch if by_epoch else total

    optimizer = dict(cfg.optim_wrapper.optimizer)
    optimizer["lr"] = optimizer.get("lr", 0) * lr_scale
    try:
        wrapper = OptimWrapper(OPTIMIZERS.build(dict(optimizer, params=[nn.Parameter(torch.zeros(1))])))
        built = []
        turns = {0, iterations}
        for settings in schedulers:
            settings = dict(settings)
            epochs = settings.get("by_epoch", True)
            # mmengine's default, which treats a loop by iterations as one epoch.
            settings.setdefault("end", total if by_epoch == epochs else iterations if by_epoch else 1)
            turns.update(_turns(settings, epoch if by_epoch or settings.get("convert_to_iter_based") else iterations))
            built.append(PARAM_SCHEDULERS.build(settings, default_args=dict(optimizer=wrapper, epoch_length=epoch)))
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        reason = str(error.args[0]).splitlines()[0] if error.args else type(error).__name__
        raise UserError(f"optim_wrapper or param_scheduler cannot be built: {reason}") from error

    lr, momentum = [], []
    for iteration in range(1, iterations + 1):
        lr.append(wrapper.get_lr()["lr"][0])
        momentum.append((wrapper.get_momentum()["momentum"] or [0.0])[0])
        wrapper.step()  # The schedulers expect this call; without a gradient it does nothing.
        epoch_ends = iteration % (epoch if by_epoch else iterations) == 0
        for scheduler in built:
            if not scheduler.by_epoch or epoch_ends:
                scheduler.step()
    return Schedule(lr, momentum, epoch if by_epoch else None, sorted(t for t in turns if t <= iterations))


def schedule_table(schedule: Schedule, at: Sequence[int]) -> Table:
    """Learning rate and momentum at some iterations."""
    grid = Table(title=f"schedule of {len(schedule.lr):,} iterations, counted from 0", title_justify="left")
    for name in ("iteration", "epoch", "learning rate", "momentum"):
        grid.add_column(name, justify="right")
    for iteration in at:
        epoch = schedule.iterations_per_epoch
        grid.add_row(
            f"{iteration:,}",
            f"{iteration / epoch:.2f}" if epoch else "-",
            f"{schedule.lr[iteration]:.6g}",
            f"{schedule.momentum[iteration]:.4g}",
        )
    return grid


def draw(schedule: Schedule, title: str) -> Figure:
    """Draw learning rate above momentum, over iterations, with epochs on the upper axis."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    names = ("learning rate", "momentum\n(Adam: beta 1)")
    for ax, values, name, colour in zip(axes, schedule[:2], names, ("tab:blue", "tab:orange"), strict=True):
        ax.plot(range(len(values)), values, c=colour, lw=1.5)
        ax.set_ylabel(name, fontsize=9)
        ax.grid(alpha=0.3)
        for turn in schedule.turns:
            ax.axvline(turn, c="0.4", lw=0.8, ls=":")
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    low, high = min(schedule.momentum), max(schedule.momentum)
    axes[1].set_ylim(low - max(0.05, high - low) * 0.2, high + max(0.05, high - low) * 0.2)
    axes[1].set_xlabel("iteration (dotted: a scheduler begins, ends or has a milestone)", fontsize=9)
    axes[1].margins(x=0.01)
    if epoch := schedule.iterations_per_epoch:
        upper = axes[0].secondary_xaxis("top", functions=(lambda x: x / epoch, lambda x: x * epoch))
        upper.set_xlabel("epoch", fontsize=9)
        upper.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    """Find the length of an epoch, run the schedulers, print the tables, draw the picture."""
    args = parse_args()
    for option, value in (("--iterations-per-epoch", args.iterations_per_epoch), ("--gpus", args.gpus)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be 1 or more")
    if args.out:
        check_writable("--out", args.out)
    cfg = load_config(args.config, needs_model=False)
    scale = 1.0
    if args.auto_scale_lr:
        base = cfg.get("auto_scale_lr", {}).get("base_batch_size")
        if not base:
            raise UserError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        scale = cfg.train_dataloader.batch_size * args.gpus / base
    epoch = args.iterations_per_epoch
    if epoch is None and "max_epochs" in (cfg.get("train_cfg") or {}):
        epoch = iterations_per_epoch(cfg, args.gpus)
    schedule = preview(cfg, epoch, scale)
    last = len(schedule.lr) - 1
    at = args.at or sorted({min(turn, last) for turn in schedule.turns})
    if wrong := [iteration for iteration in at if not 0 <= iteration <= last]:
        raise UserError(f"--at {wrong[0]}: iterations are 0 to {last}")
    out = console()
    out.print(schedule_table(schedule, at))
    if args.out:
        save_figure(draw(schedule, Path(args.config).stem), args.out)
        out.print(f"wrote {args.out}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
