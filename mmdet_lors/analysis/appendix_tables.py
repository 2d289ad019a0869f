"""Tables 9 to 11 of the LORS paper, DeiT-Tiny on CIFAR-100, as data, and as Markdown with our counts beside them.

Accuracies are the paper's: this project counts, it did not train on CIFAR-100.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmengine.config import Config

from mmdet_lors.engine.build import build_without_weights

FOLDER = "classification/{}"
ABLATION = "classification/ablations/{}"
PLAIN, LORS = FOLDER.format("deit-tiny_cifar100"), FOLDER.format("deit-tiny-lors_cifar100")


@dataclass(frozen=True)
class Row:
    """One row: its labels, the config that builds it, what the paper says."""

    labels: tuple[str, ...]
    config: str
    """Below configs/, without '.py'."""
    accuracy: tuple[float, float]
    """Top-1 and top-5 of the paper, per cent."""
    percent: float | None = None
    """Encoder parameters of the paper, per cent of the plain ones; None where it does not give them."""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the paper's appendix."""

    number: int
    title: str
    labels: tuple[str, ...]
    rows: tuple[Row, ...]


OURS = "the paper's cells are lost; allocation chosen by this project"
LATE, EARLY = "1 x 9, 2, 4, 6", "6, 4, 2, 1 x 9"
WHICH = "which of the two rows the paper means is lost; ours by the order of its Table 9"

TABLES = (
    Table(
        9,
        "LORST in DeiT-Tiny's encoder",
        ("LORST in self-attention", "in FFN"),
        (
            Row(("", ""), PLAIN, (63.66, 84.23), 100.0),
            Row(("x", ""), ABLATION.format("table9_lorst-attention"), (63.51, 84.85), 89.7),
            Row(("", "x"), ABLATION.format("table9_lorst-ffn"), (63.93, 84.69), 66.2),
            Row(("x", "x"), LORS, (63.97, 85.10), 47.5),
        ),
    ),
    Table(
        10,
        "Allocation of groups over 12 layers, rank 32",
        ("groups K of self-attention", "of FFN"),
        (
            Row(("0", "0"), ABLATION.format("table10_row-1_recurrent"), (59.13, 83.11)),
            Row(("1", "0"), ABLATION.format("table10_row-2_private-attention"), (59.98, 83.52), note=OURS),
            Row(("0", "1"), ABLATION.format("table10_row-3_private-ffn"), (60.43, 83.41), note=OURS),
            Row(("1", "1"), ABLATION.format("table10_row-4_one-group"), (62.30, 84.33)),
            Row((LATE, "1"), ABLATION.format("table10_row-5_late-attention"), (62.92, 83.83), note=OURS),
            Row(("1", EARLY), ABLATION.format("table10_row-6_early-ffn"), (62.94, 84.50), note=OURS),
            Row((LATE, EARLY), LORS, (63.97, 85.10)),
        ),
    ),
    Table(
        11,
        "Weights loaded from ImageNet, without LORST",
        ("self-attention loaded", "FFN loaded"),
        (
            Row(("x", "x"), ABLATION.format("table11_imagenet-both"), (78.85, 92.73)),
            Row(("x", ""), ABLATION.format("table11_imagenet-attention"), (65.28, 86.40), note=WHICH),
            Row(("", "x"), ABLATION.format("table11_imagenet-ffn"), (64.19, 84.69), note=WHICH),
            Row(("", ""), PLAIN, (63.66, 84.23)),
        ),
    ),
)


def encoder_parameters(model_cfg: dict) -> int:
    """Parameters of a vision transformer's layers, of a shared weight once; ``model_cfg`` is a config's ``model``."""
    return sum(p.numel() for p in build_without_weights(model_cfg).network.blocks.parameters())


def differs(row: Row, ours: float) -> bool:
    """Whether ours, in per cent, is not the paper's number to one decimal place."""
    return row.percent is not None and round(ours, 1) != row.percent


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [cells[0], "|" + "---|" * len(header), *cells[1:], ""]


def markdown(root: Path) -> list[str]:
    """The lines of the section.

    Args:
        root: the project's folder.
    """
    count = cache(lambda config: encoder_parameters(Config.fromfile(root / "configs" / f"{config}.py").model))
    plain = count(PLAIN)
    percent = {row.config: 100 * count(row.config) / plain for table in TABLES for row in table.rows}
    lines = ["## Tables 9 to 11: DeiT-Tiny on CIFAR-100", ""]
    lines += [
        "Encoder parameters are those of the 12 layers, biases and norms included, each shared weight once.",
        "**No model was trained on CIFAR-100 by this project.**",
        "",
    ]
    for table in TABLES:
        given = any(row.percent is not None for row in table.rows)
        header = [*table.labels, "config", "encoder parameters (ours)", *(["per cent (paper)"] if given else [])]
        header += ["per cent (ours)", "top-1 (paper)", "top-5 (paper)", "top-1 (measured by this project)", "differs"]
        rows = []
        for row in table.rows:
            cells = [*row.labels, f"[{Path(row.config).name}](../configs/{row.config}.py)", f"{count(row.config):,}"]
            cells += [f"{row.percent:.1f}"] if given else []
            cells += [f"{percent[row.config]:.1f}", *(f"{value:.2f}" for value in row.accuracy), ""]
            rows.append([*cells, "**per cent** [a]" if differs(row, percent[row.config]) else row.note])
        lines += [f"### Table {table.number}: {table.title}", "", *_grid(header, rows)]
    attention, ffn, both = (100 - percent[row.config] for row in TABLES[0].rows[1:])
    paper_attention, paper_ffn, paper_both = (100 - row.percent for row in TABLES[0].rows[1:])
    lines += [
        "[a] Self-attention and FFN have no weight in common, so that what LORST saves in each adds up to what it "
        f"saves in both. In the paper it does not: {paper_attention:.1f} % and {paper_ffn:.1f} % make "
        f"{paper_attention + paper_ffn:.1f} %, not {paper_both:.1f} %. Here {attention:.1f} % and {ffn:.1f} % make "
        f"{both:.1f} %. The last row, which is the default, agrees.",
        "",
        "Table 10: the first row has no private weight, the second and third have some, as the paper says; the fourth "
        "has one group in every layer. Which weights the second and third, and which layers the fifth and sixth "
        "favour, was chosen here: private weights in self-attention or FFN alone, and the default's larger groups for "
        "one of the two. Table 11: the norm before each part is loaded with it.",
        "",
    ]
    return lines
