"""Plot training curves of one or several runs, from the logs that every run writes (vis_data/scalars.json).

Each --keys pattern has a panel, shared by all keys that match it ('stage*_loss_iou': the stages' losses together). RUN
is a scalars.json, or a work folder, whose newest run is plotted with the runs that it was resumed from. Nothing is
smoothed without --smooth; the logged values stay visible behind a smoothed curve. Losses, times and gradient norms are
already logged as means over the last 50 iterations (log_processor.window_size).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import nan
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.analysis.output import console, save_figure
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

DEFAULT_KEYS = ("loss", "lr", "coco/bbox_mAP", "accuracy/top1")
PLACES = ("step", "iter", "epoch")
"""Fields of a log line that say when it was logged, not what was measured."""
STYLES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    """The values that one run logged under one key."""

    x: list[float]
    y: list[float]
    unit: str
    """Unit of x: 'iteration' or 'epoch'."""
    training: bool
    """Whether it was logged during training, not by a validation."""


def read_lines(path: Path) -> list[dict]:
    """The lines of a scalars.json.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object; a last line that was cut short is skipped.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"log {path} cannot be read: {error}") from error
    lines, found = text.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and number > 1:
                break
            raise UserError(
                f"log {path}, line {number}: not JSON; RUN must be a work folder or a scalars.json"
            ) from error
        if not isinstance(entry, Mapping):
            raise UserError(f"log {path}, line {number}: not an object of keys and values")
        found.append({key: nan if value is None else value for key, value in entry.items()})
    return found


def _train_steps(lines: Sequence[dict]) -> list[int]:
    return [line["step"] for line in lines if "iter" in line]


def _continue(older: list[dict], newer: list[dict]) -> list[dict]:
    """The older run's lines up to the newer one's beginning, and the newer one's; only these if it was not resumed."""
    steps = _train_steps(newer)
    interval = steps[1] - steps[0] if len(steps) > 1 else 0
    if not steps or (interval and steps[0] <= interval):
        return newer
    epoch = next(line.get("epoch") for line in newer if "iter" in line)
    kept = []
    for line in older:
        # A validation's step is the epoch, or, in training by iterations, the iteration.
        first = steps[0] if "iter" in line or epoch is None else epoch
        if line.get("step", 0) < first:
            kept.append(line)
    return kept + newer


def read_run(path: Path) -> list[dict]:
    """The log of a run: a file's, or a work folder's newest with the runs that it was resumed from.

    Raises:
        UserError: the run does not exist or has no log.
    """
    if path.is_file():
        return read_lines(path)
    if not path.is_dir():
        raise UserError(f"run {path} does not exist")
    files = sorted([*path.glob("vis_data/scalars.json"), *path.glob("*/vis_data/scalars.json")])
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise UserError(f"run {path} has no */vis_data/scalars.json: nothing was logged there")
    lines = read_lines(files[-1])
    for file in reversed(files[:-1]):
        lines = _continue(read_lines(file), lines)
    return lines


def curves(lines: Sequence[dict]) -> dict[str, Curve]:
    """Key -> curve. Training is plotted by iteration, validation by the unit it was logged with, epoch or iteration."""
    found: dict[str, Curve] = {}
    epoch = None
    for line in lines:
        training = "iter" in line
        if training:
            epoch = line.get("epoch")
        unit = "iteration" if training or epoch is None else "epoch"
        for key, value in line.items():
            if key in PLACES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            # Both log time and data_time; the training's are kept.
            curve = found.setdefault(key, Curve([], [], unit, training))
            if curve.training == training:
                curve.x.append(line.get("step", len(curve.x)))
                curve.y.append(float(value))
    return found


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, s_t = w s_(t-1) + (1 - w) x_t, divided by 1 - w^t; weight 0 changes nothing."""
    mean, out = 0.0, []
    for t, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**t))
    return out


def choose(patterns: Sequence[str] | None, runs: Mapping[str, Mapping[str, Curve]]) -> dict[str, list[str]]:
    """Panel -> keys. Without patterns: total loss, learning rate and the metric, as far as they were logged.

    Raises:
        UserError: a pattern that matches no key of any run.
    """
    keys = list(dict.fromkeys(key for found in runs.values() for key in found))
    panels = {pattern: [key for key in keys if fnmatchcase(key, pattern)] for pattern in patterns or DEFAULT_KEYS}
    if patterns is None:
        panels = {pattern: fitting for pattern, fitting in panels.items() if fitting}
    if empty := [pattern for pattern, fitting in panels.items() if not fitting]:
        raise UserError(f"--keys {empty[0]}: no run logged it; logged: {', '.join(keys)}")
    return panels or {keys[0]: keys[:1]}


def draw(runs: Mapping[str, Mapping[str, Curve]], panels: Mapping[str, Sequence[str]], weight: float = 0.0) -> Figure:
    """Draw a panel per pattern; colours are runs, or, in a panel with several keys, keys, and line styles are runs."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (pattern, keys) in zip(axes, panels.items(), strict=False):
        units = []
        for r, (run_name, found) in enumerate(runs.items()):
            for k, key in enumerate(keys):
                if key not in found:
                    continue
                curve = found[key]
                units.append(curve.unit)
                many = len(keys) > 1
                colour = colormaps["tab10"]((k if many else r) % 10)
                label = " ".join([key] * many + [run_name] * (len(runs) > 1))
                style = dict(c=colour, ls=STYLES[r % len(STYLES)] if many else "-", lw=1.3)
                marker = dict(marker="o", ms=4) if len(curve.x) < 15 else {}
                y = curve.y
                # Validations are few, and not means over batches.
                if weight and curve.training:
                    ax.plot(curve.x, y, **{**style, "lw": 1, "alpha": 0.3})
                    y = smooth(y, weight)
                ax.plot(curve.x, y, label=label or None, **style, **marker)
        ax.set_title(pattern, fontsize=10)
        ax.set_xlabel(" or ".join(dict.fromkeys(units)), fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        ax.grid(alpha=0.3)
        ax.margins(x=0.02)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    return figure


def table(runs: Mapping[str, Mapping[str, Curve]], panels: Mapping[str, Sequence[str]]) -> Table:
    """One row per key and run: number of points; first, last, lowest and highest value."""
    grid = Table(title="training curves", title_justify="left")
    for name in ("key", "run", "points", "first", "last", "lowest", "highest"):
        grid.add_column(name, justify="left" if name in ("key", "run") else "right")
    for key in dict.fromkeys(key for keys in panels.values() for key in keys):
        for name, found in runs.items():
            if key in found:
                y = found[key].y
                grid.add_row(key, name, str(len(y)), *(f"{value:.5g}" for value in (y[0], y[-1], min(y), max(y))))
    return grid


def main() -> None:
    """Read the logs, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="work folders, or scalars.json files")
    parser.add_argument(
        "--keys",
        nargs="+",
        metavar="KEY",
        help=f"one panel each; * and ? match several keys (default: {', '.join(DEFAULT_KEYS)})",
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="names of the runs (default: those of their folders)"
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.0,
        metavar="W",
        help="weight of the past in a moving average, from 0 to below 1 (default: 0, no smoothing)",
    )
    parser.add_argument("--list", action="store_true", help="only print the keys that were logged")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write: .png, .pdf or .svg")
    args = parser.parse_args()
    if args.out:
        check_writable("--out", args.out)
    if not 0 <= args.smooth < 1:
        raise UserError(f"--smooth {args.smooth:g}: must be 0 or more and below 1")
    names = args.names or [str(path) if path.is_file() else path.resolve().name for path in args.runs]
    if len(names) != len(args.runs):
        raise UserError(f"--names has {len(names)} entries for {len(args.runs)} runs")
    if len(set(names)) < len(names):
        raise UserError(f"runs of equal names ({', '.join(names)}): give different ones with --names")
    runs = {name: curves(read_run(path)) for name, path in zip(names, args.runs, strict=True)}
    for name, found in runs.items():
        if not found:
            raise UserError(f"run {name} logged no number")
    out = console()
    if args.list:
        out.print("\n".join(dict.fromkeys(key for found in runs.values() for key in found)), highlight=False)
        return
    panels = choose(args.keys, runs)
    out.print(table(runs, panels))
    if args.out:
        save_figure(draw(runs, panels, args.smooth), args.out)
        out.print(f"wrote {args.out}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
