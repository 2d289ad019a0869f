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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from torch import Tensor, nn

from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.analysis.output import console, save_figure
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.config_and_weights import read_weights
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError
from mmdet_lors.lors import LORSA, LORST
from mmdet_lors.lors.stack import StackedWeight
from mmdet_lors.lors.static import PrivateLORST
from mmdet_lors.valid_json import to_json

ADAPTIVE_NAMES = ("M, channel mixing (LORSA)", "S, spatial mixing (LORSA)")
"""AdaMixer's two generated weights, in the order of LORSA's shapes."""
SHARED, PRIVATE = "tab:blue", "tab:orange"
CHUNK = 1 << 20


@dataclass
class SharedWeightReport:
    """One weight that S stages share."""

    name: str
    unit: str
    """What the weight belongs to: 'stage' or 'layer'."""
    ranks: list[int]
    """K_i * r_i."""
    grams: dict[str, Tensor]
    """Per kind of energy ('constant' and 'of the query' for LORSA, 'static' otherwise): inner products of W_shared,
    P_1, ..., P_S, (S + 1, S + 1), float64."""
    singular_values: list[Tensor]
    """Of each P_i, K_i * r_i or fewer, largest first."""

    @property
    def gram(self) -> Tensor:
        """All kinds together."""
        return sum(self.grams.values())

    @property
    def shared(self) -> float:
        """|W_shared|^2."""
        return self.gram[0, 0].item()

    def private(self, stage: int) -> float:
        """|P_i|^2."""
        return self.gram[stage + 1, stage + 1].item()

    def cross(self, stage: int) -> float:
        """2 <W_shared, P_i>."""
        return 2 * self.gram[0, stage + 1].item()

    def total(self, stage: int) -> float:
        """|W_i|^2."""
        return self.shared + self.private(stage) + self.cross(stage)

    def private_share(self, stage: int) -> float:
        """|P_i|^2 / (|W_shared|^2 + |P_i|^2), 0 for a weight that is zero."""
        both = self.shared + self.private(stage)
        return self.private(stage) / both if both else 0.0

    @property
    def similarity(self) -> Tensor:
        """cos(W_i, W_j), (S, S); nan beside a weight that is zero."""
        gram = self.gram
        effective = gram[0, 0] + gram[0, 1:, None] + gram[0, 1:] + gram[1:, 1:]
        norm = effective.diagonal().clamp(min=0).sqrt()
        return effective / norm[:, None] / norm

    def as_dict(self) -> dict:
        """Every number, for JSON."""
        stages = []
        for i, rank in enumerate(self.ranks):
            stages.append(
                dict(
                    rank=rank,
                    shared=self.shared,
                    private=self.private(i),
                    cross=self.cross(i),
                    total=self.total(i),
                    private_share=self.private_share(i),
                    kinds={
                        kind: dict(shared=gram[0, 0].item(), private=gram[i + 1, i + 1].item())
                        for kind, gram in self.grams.items()
                    },
                    singular_values=self.singular_values[i].tolist(),
                )
            )
        # JSON has no nan.
        similarity = [[None if value != value else value for value in row] for row in self.similarity.tolist()]
        return dict(name=self.name, unit=self.unit, stages=stages, similarity=similarity)


def inner_products(tensors: Sequence[Tensor | None]) -> Tensor:
    """All <X_a, X_b> of n tensors of one size, (n, n), summed in float64; None is zero."""
    size = next(t.numel() for t in tensors if t is not None)
    flat = [None if t is None else t.flatten() for t in tensors]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for first in range(0, size, CHUNK):
        length = min(CHUNK, size - first)
        chunk = torch.zeros(len(flat), length, dtype=torch.float64)
        for row, values in zip(chunk, flat, strict=True):
            if values is not None:
                row.copy_(values[first : first + length])
        gram += chunk @ chunk.T
    return gram


def low_rank_singular_values(private: PrivateLORST | None) -> Tensor:
    """Singular values of B A, from the triangular factors of B and A^T, in float64."""
    if private is None:
        return torch.zeros(0, dtype=torch.float64)
    left, right = (torch.linalg.qr(factor.double()).R for factor in (private.B, private.A.T))
    return torch.linalg.svdvals(left @ right.T)


def row_singular_values(weight: Tensor, bias: Tensor, copies: int, rows: int, rank: int) -> Tensor:
    """Of what a generator makes, its rows against columns and query together, squares added over the copies.

    Args:
        weight, bias: (copies * rows * cols, m) and (copies * rows * cols,).
        copies, rows: as in LORSA.
        rank: K * r; beyond it all are zero.
    """
    squares = 0
    for columns, constant in zip(weight.chunk(copies), bias.chunk(copies), strict=True):
        matrix = torch.cat([columns.reshape(rows, -1), constant.reshape(rows, -1)], dim=1).double()
        squares = squares + torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp(min=0)
    return squares.sqrt()[:rank]


def report_lorsa(lorsa: LORSA) -> Iterator[SharedWeightReport]:
    """One report for each matrix that LORSA generates."""
    for s, (rows, _) in enumerate(lorsa.shapes):
        shared = (None, None) if lorsa.shared is None else lorsa.shared.blocks()[s]
        private = [(None, None) if p is None else p.fold(s, None) for p in lorsa.private]
        ranks = [0 if p is None else p.groups * p.rank for p in lorsa.private]
        singular = [
            torch.zeros(0, dtype=torch.float64) if p[0] is None else row_singular_values(*p, lorsa.copies, rows, rank)
            for p, rank in zip(private, ranks, strict=True)
        ]
        of_query, constant = (inner_products(part) for part in zip(shared, *private, strict=True))
        name = ADAPTIVE_NAMES[s] if len(lorsa.shapes) == len(ADAPTIVE_NAMES) else f"generated weight {s} (LORSA)"
        yield SharedWeightReport(name, "stage", ranks, {"constant": constant, "of the query": of_query}, singular)


def report_static(
    name: str, unit: str, shared: Tensor | None, private: Sequence[PrivateLORST | None]
) -> SharedWeightReport:
    """The report of a weight W_i = W_shared + B_i A_i."""
    products = [None if p is None else p.B @ p.A for p in private]
    ranks = [0 if p is None else len(p.A) for p in private]
    singular = [low_rank_singular_values(p) for p in private]
    return SharedWeightReport(name, unit, ranks, {"static": inner_products([shared, *products])}, singular)


def _stack_name(paths: Sequence[str]) -> str:
    """Where the weights of a stack are, with * where the paths differ."""
    parts = zip(*(path.removesuffix("_lorst").split(".") for path in paths), strict=True)
    return ".".join(found.pop() if len(found := set(part)) == 1 else "*" for part in parts)


@torch.no_grad()
def reports(model: nn.Module) -> list[SharedWeightReport]:
    """Every weight in the model that LORS shares; empty for a model without LORS."""
    found: list[SharedWeightReport] = []
    stacks: dict[int, list[tuple[str, StackedWeight]]] = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(module, LORSA):
            found += report_lorsa(module)
        elif isinstance(module, LORST):
            found.append(report_static("W_out, output projection (LORST)", "stage", module.shared, module.private))
        elif isinstance(module, StackedWeight):
            stacks[id(module.first)].append((path, module))
    for members in stacks.values():
        members.sort(key=lambda member: member[1].position)
        paths, weights = zip(*members, strict=True)
        private = [weight.private for weight in weights]
        found.append(report_static(_stack_name(paths), "layer", weights[0].first.shared, private))
    return found


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
    similarity = report.similarity
    count = len(similarity)
    shown = ax.imshow(similarity, cmap="magma", vmin=min(0.0, similarity.nan_to_num(0).min().item()), vmax=1)
    size = 9 if count <= 4 else 7 if count <= 8 else 5
    for i in range(count):
        for j in range(count):
            value = similarity[i, j].item()
            ax.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=size, color="black" if value > 0.6 else "white"
            )
    ax.set_xticks(range(count))
    ax.set_yticks(range(count))
    ax.set_xlabel(f"{report.unit}: cosine of the whole weights", fontsize=9)
    ax.figure.colorbar(shown, ax=ax, shrink=0.9)


def main() -> None:
    """Read the weights, measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of any model with LORS")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write: .png, .pdf or .svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    args = parser.parse_args()
    if args.out:
        check_writable("--out", args.out)
    if args.json:
        check_writable("--json", args.json, (".json",))
    cfg = load_config(args.config)
    if "model" not in cfg:
        raise UserError(f"config {args.config} has no model")
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
