"""What LORS learned: how much of each weight is shared and how much private, and how alike the stages became.

Any model with LORS: AdaMixer's decoder (LORSA makes M and S, LORST is the output projection), and every stack of layers
that a WithLORS config shares. Weights of stage i are W_i = W_shared + P_i, P_i = sum_k B_i^k A_i^k (with E between them
for LORSA). Energy is the squared Frobenius norm:

    |W_i|^2 = |W_shared|^2 + |P_i|^2 + 2 <W_shared, P_i>

A weight that LORSA generates is affine in the query, W_i(q) = C_i q + c_i, and its energy is |C_i|^2 + |c_i|^2: the
mean of |W_i(q)|^2 over queries of zero mean and unit covariance. The part "of the query" is C, the "constant" one c.
Singular values are those of P_i (for LORSA: P_i's rows against everything else, squares added over the sampling
groups), so that their squares add up to its energy. Similarity is the cosine between W_i and W_j. Biases that LORST
keeps per stage are not part of W_i.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of any model with LORS")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write: .png, .pdf or .svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from shared_weights import SharedWeightReport, reports

from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.analysis.output import console, heat_map, save_figure
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.config_and_weights import read_weights
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError
from mmdet_lors.lors import LORSA, LORST
from mmdet_lors.lors.stack import StackedWeight
from mmdet_lors.valid_json import to_json

SHARED, PRIVATE = "tab:blue", "tab:orange"


def table(found: Sequence[SharedWeightReport]) -> Table:
    """One row per weight and stage."""
    grid = Table(title="energy: |W|^2 = shared + private + cross", title_justify="left")
    numbers = ("stage", "K r", "shared", "private", "cross", "|W|^2", "private share", "90 % of private in")
    for name in ("weight", *numbers):
        grid.add_column(name, justify="left" if name == "weight" else "right", overflow="fold")
    for report in found:
        for i, rank in enumerate(report.ranks):
            energy = report.singular_values[i].square()
            needed = int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
            numbers = (report.shared, report.private(i), report.cross(i), report.total(i))
            grid.add_row(
                report.name if i == 0 else "",
                str(i),
                str(rank),
                *(f"{number:.4g}" for number in numbers),
                f"{report.private_share(i):.2%}",
                f"{needed} of {rank}" if rank and energy.sum() else "-",
                end_section=i == len(report.ranks) - 1,
            )
    return grid


def draw(found: Sequence[SharedWeightReport]) -> Figure:
    """A row per weight: energies, singular values, similarity."""
    stages = max(len(report.ranks) for report in found)
    figure = Figure(figsize=(max(11.5, 4.5 + 0.9 * stages), 2.9 * len(found)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, report in zip(parts, found, strict=True):
        part.suptitle(report.name, fontsize=11, fontweight="bold")
        axes = part.subplots(1, 3, width_ratios=(1.5, 1.2, 1))
        _energies(axes[0], report)
        _singular_values(axes[1], report)
        _similarity(axes[2], report)
    return figure


def _energies(ax: Axes, report: SharedWeightReport) -> None:
    kinds = len(report.grams)
    width = 0.8 / (2 * kinds)
    stages = range(len(report.ranks))
    positive = []
    for k, (kind, gram) in enumerate(report.grams.items()):
        suffix = f", {kind}" if kinds > 1 else ""
        hatch = "////" if kind == "constant" else None
        pairs: tuple[tuple[str, str, int, Callable[[int], float]], ...] = (
            ("shared", SHARED, k, lambda i, gram=gram: gram[0, 0].item()),
            ("private", PRIVATE, kinds + k, lambda i, gram=gram: gram[i + 1, i + 1].item()),
        )
        for name, colour, place, energy in pairs:
            values = [energy(i) for i in stages]
            positive += [v for v in values if v > 0]
            where = [i + (place + 0.5) * width - 0.4 for i in stages]
            ax.bar(where, values, width, color=colour, hatch=hatch, ec="white", lw=0.5, label=name + suffix)
    if positive:
        ax.set_yscale("log")
        # Room for the legend.
        low, high = min(positive), max(positive)
        ax.set_ylim(low / 2, high * (high / low * 2) ** 0.45)
    few = len(stages) <= 4
    labels = [f"{i}\n{report.private_share(i):{'.1%' if few else '.0%'}}{' private' if few else ''}" for i in stages]
    ax.set_xticks(list(stages), labels=labels, fontsize=8)
    ax.set_xlabel(report.unit if few else f"{report.unit}, and its private share", fontsize=9)
    ax.set_ylabel("energy")
    ax.legend(fontsize=7, ncols=2, loc="upper center")


def _singular_values(ax: Axes, report: SharedWeightReport) -> None:
    colours = _stage_colours(len(report.ranks))
    drawn = False
    for i, values in enumerate(report.singular_values):
        values = values[values > 0]
        if len(values):
            ax.plot(range(1, len(values) + 1), values, "o-", ms=3, lw=1, c=colours[i], label=f"{report.unit} {i}")
            drawn = True
    ax.set_xlabel("private part's singular values, largest first", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if drawn:
        ax.set_yscale("log")
        ax.tick_params(axis="y", which="both", labelsize=7)
        ax.legend(fontsize=7, ncols=1 + len(report.ranks) // 7)
    else:
        ax.text(0.5, 0.5, "the private part is zero", ha="center", va="center", transform=ax.transAxes)


def _stage_colours(count: int) -> list[tuple]:
    return [colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def _similarity(ax: Axes, report: SharedWeightReport) -> None:
    heat_map(ax, report.similarity)
    ax.set_xlabel(f"{report.unit}: cosine of the whole weights", fontsize=9)


def main() -> None:
    """Read the weights, measure, print, draw."""
    args = parse_args()
    if args.out:
        check_writable("--out", args.out)
    if args.json:
        check_writable("--json", args.json, (".json",))
    cfg = load_config(args.config)
    model = build_without_weights(cfg.model)
    if not any(isinstance(module, LORSA | LORST | StackedWeight) for module in model.modules()):
        raise UserError(f"config {args.config} has no LORS: its layers share no weight")
    weights, _ = read_weights(args.checkpoint, model)
    model.load_state_dict(weights, assign=True)
    found = reports(model)
    out = console()
    out.print(table(found))
    if args.json:
        args.json.write_text(to_json([report.as_dict() for report in found], indent=2) + "\n")
        out.print(f"wrote {args.json}", soft_wrap=True)
    if args.out:
        save_figure(draw(found), args.out)
        out.print(f"wrote {args.out}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
