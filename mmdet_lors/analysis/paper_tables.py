"""Tables 1 to 8 of the LORS paper as data, and all its tables as Markdown with our counts beside the paper's.

A row names the config that builds it. AP is the paper's: this project counts, it did not train on COCO.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmengine.config import Config

from mmdet_lors.adamixer.folding import folded_config
from mmdet_lors.lors import LORSA, LORST

from . import appendix_tables
from .complexity import COMPONENTS, Report, measure

COMMAND = "python tools/analysis_tools/model_report.py --paper > docs/paper_tables.md"

METRICS: dict[str, tuple[str, Callable[[Report], float], str]] = {
    "decoder_parameters": ("decoder parameters, M", lambda r: r.decoder.parameters / 1e6, ".2f"),
    "parameters": ("parameters, M", lambda r: r.total.parameters / 1e6, ".2f"),
    "decoder_gflops": ("decoder GFLOPs", lambda r: r.decoder.multiply_adds / 1e9, ".1f"),
    "gflops": ("GFLOPs", lambda r: r.total.multiply_adds / 1e9, ".1f"),
}
"""What the paper's tables give -> heading, our value, how it is printed."""

FULL_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Row:
    """One row of a table: what it is called, what builds it, what the paper says."""

    labels: tuple[str, ...]
    config: str
    """Below configs/, without '.py'."""
    paper: tuple[float, ...]
    """In the order of the table's metrics."""
    ap: tuple[float, ...]
    reason: str | None = None
    """Key of :data:`REASONS`, for a row in which our counts differ from the paper's."""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    number: int
    title: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    ap: tuple[str, ...]
    rows: tuple[Row, ...]


REASONS = {
    "more-queries": (
        "The paper's 300-query AdaMixer cannot have the decoder of its 100-query one. Queries are no part of a "
        "decoder, yet the paper's grows from 110 M to 113 M with them, and the whole model by 4 M, of which 200 more "
        "queries are 0.05 M. The operations say the same: all but self-attention are proportional to the queries, so a "
        "decoder of {plain100:.1f} G at 100 queries takes 3 x {plain100:.1f} + {attention:.1f} = {plain300:.1f} G at "
        "300, and even one of 12.5 G takes no more than 37.7 G; the paper has 39. The released configs build the "
        "same decoder for 100 and 300 queries, and so do ours."
    ),
    "more-queries-lors": (
        "Parameters agree. All operations but self-attention are proportional to the queries: {lors100:.1f} G at 100 "
        "queries make 3 x {lors100:.1f} + {attention:.1f} = {lors300:.1f} G at 300, 3 % less than the paper's 56 G, "
        "which needs 18.4 G at 100, where the paper prints 18. The operations are listed below; the paper does not "
        "say which it counts, so that the rest cannot be attributed."
    ),
    "swin": (
        "The decoder as in [{n[more-queries]}]. Backbone and neck take 195 G in the paper (234 - 39; 250 - 56 makes "
        "194) and {swin:.1f} G here, matrix products inside the windows and padded windows included; the paper does "
        "not say which operations it counts."
    ),
    "swin-lors": "Parameters agree. The decoder as in [{n[more-queries-lors]}], backbone and neck as in [{n[swin]}].",
    "4-lorsa": (
        "79 M does not follow from the paper's equations. The LORS decoder's {lors:.2f} M, with LORST's {lorst:.2f} M "
        "replaced by six output projections of their own ({out_proj:.2f} M), make {lorsa_only:.2f} M; with 4 groups "
        "of 32 points, too, it would not be 79 but {lorsa_only_4x32:.2f} M."
    ),
    "4-lorst": (
        "66 M does not follow from the paper's equations. Shared and private LORST in AdaMixer's own 4 groups of 32 "
        "points, with six generators of their own ({generators:.2f} M), make {lorst_only:.2f} M; in 2 groups of 64 "
        "points it would be {lorst_only_2x64:.2f} M."
    ),
    "5": (
        "Shared and private parts make {lors:.2f} M together, in the paper as here. Either alone cannot have more, as "
        "the paper's 58 M and 43 M do: without the private LORSA ({private:.2f} M) it is {shared_only:.2f} M, without "
        "the shared one ({shared:.2f} M) {private_only:.2f} M."
    ),
}
"""Why a row differs; the figures are filled in from our counts."""

PLAIN_1X, LORS_1X = "adamixer/adamixer_r50_{}-queries_1x_coco", "lors/adamixer-lors_r50_{}-queries_1x_coco"
PLAIN_3X, LORS_3X = (f"{name}_{{}}_{{}}-queries_crop-ms-480-800-3x_coco" for name in
                     ("adamixer/adamixer", "lors/adamixer-lors"))  # fmt: skip
ABLATION = "lors/ablations/{}"
LORS = LORS_1X.format(100)

TABLES = (
    Table(
        2,
        "Main results, 1x",
        ("method", "queries", "epochs", "training time (paper)"),
        ("decoder_parameters", "parameters", "decoder_gflops", "gflops"),
        FULL_AP,
        (
            Row(
                ("AdaMixer", "100", "12", "8.5 h"),
                PLAIN_1X.format(100),
                (110, 135, 12, 104),
                (42.7, 61.5, 45.9, 24.7, 45.4, 59.2),
            ),
            Row(
                ("AdaMixer + LORS", "100", "12", "9.5 h"),
                LORS,
                (35, 60, 18, 110),
                (42.6, 61.4, 46.0, 25.0, 45.6, 58.5),
            ),
            Row(
                ("AdaMixer", "300", "12", "10 h"),
                PLAIN_1X.format(300),
                (113, 139, 39, 132),
                (44.1, 63.4, 47.4, 27.0, 46.9, 59.5),
                "more-queries",
            ),
            Row(
                ("AdaMixer + LORS", "300", "12", "12 h"),
                LORS_1X.format(300),
                (35, 60, 56, 149),
                (44.1, 63.0, 47.7, 27.8, 47.0, 59.5),
                "more-queries-lors",
            ),
        ),
    ),
    Table(
        3,
        "Main results, 3x",
        ("method", "backbone", "queries", "epochs"),
        ("parameters", "gflops"),
        FULL_AP,
        (
            Row(
                ("AdaMixer", "R-50", "100", "36"),
                PLAIN_3X.format("r50", 100),
                (135, 104),
                (43.2, 61.8, 46.7, 25.0, 46.1, 58.8),
            ),
            Row(
                ("AdaMixer + LORS", "R-50", "100", "36"),
                LORS_3X.format("r50", 100),
                (60, 110),
                (43.7, 62.3, 47.3, 25.5, 46.4, 60.0),
            ),
            Row(
                ("AdaMixer", "R-50", "300", "36"),
                PLAIN_3X.format("r50", 300),
                (139, 132),
                (47.0, 66.0, 51.1, 30.1, 50.2, 61.8),
                "more-queries",
            ),
            Row(
                ("AdaMixer + LORS", "R-50", "300", "36"),
                LORS_3X.format("r50", 300),
                (60, 149),
                (47.6, 66.6, 52.0, 31.1, 50.2, 62.5),
                "more-queries-lors",
            ),
            Row(
                ("AdaMixer", "R-101", "300", "36"),
                PLAIN_3X.format("r101", 300),
                (158, 208),
                (48.0, 67.0, 52.4, 30.0, 51.2, 63.7),
                "more-queries",
            ),
            Row(
                ("AdaMixer + LORS", "R-101", "300", "36"),
                LORS_3X.format("r101", 300),
                (79, 225),
                (48.2, 67.5, 52.6, 31.7, 51.3, 63.8),
                "more-queries-lors",
            ),
            Row(
                ("AdaMixer", "Swin-S", "300", "36"),
                PLAIN_3X.format("swin-s", 300),
                (164, 234),
                (51.3, 71.2, 55.7, 34.2, 54.6, 67.3),
                "swin",
            ),
            Row(
                ("AdaMixer + LORS", "Swin-S", "300", "36"),
                LORS_3X.format("swin-s", 300),
                (85, 250),
                (51.8, 71.6, 56.4, 35.4, 55.0, 68.4),
                "swin-lors",
            ),
        ),
    ),
    Table(
        4,
        "Adaptive and static LORS",
        ("LORSA", "LORST"),
        ("decoder_parameters",),
        ("AP",),
        (
            Row(("", ""), PLAIN_1X.format(100), (110,), (42.5,), note="AP as the paper's authors reproduced it"),
            Row(("x", ""), ABLATION.format("table4_lorsa-only"), (79,), (42.6,), "4-lorsa"),
            Row(("", "x"), ABLATION.format("table4_lorst-only"), (66,), (42.6,), "4-lorst"),
            Row(("x", "x"), LORS, (35,), (42.6,)),
        ),
    ),
    Table(
        5,
        "Shared and private weights of LORSA",
        ("shared", "private"),
        ("decoder_parameters",),
        ("AP",),
        (
            Row(("x", ""), ABLATION.format("table5_lorsa-shared-only"), (58,), (40.9,), "5"),
            Row(("", "x"), ABLATION.format("table5_lorsa-private-only"), (43,), (41.4,), "5"),
            Row(("x", "x"), LORS, (35,), (42.6,)),
        ),
    ),
    Table(
        6,
        "Groups and rank of LORSA",
        ("groups K", "rank r"),
        ("decoder_parameters",),
        ("AP",),
        (
            Row(("1 1 1 1 1 1", "8"), ABLATION.format("table6_lorsa-rank-8_groups-111111"), (32,), (41.8,)),
            Row(("1 1 1 1 1 1", "16"), ABLATION.format("table6_lorsa-rank-16_groups-111111"), (34,), (42.1,)),
            Row(("2 2 2 2 2 2", "16"), ABLATION.format("table6_lorsa-rank-16_groups-222222"), (35,), (42.4,)),
            Row(("1 1 2 2 3 3", "16"), LORS, (35,), (42.6,)),
            Row(("1 1 1 1 1 1", "32"), ABLATION.format("table6_lorsa-rank-32_groups-111111"), (38,), (41.2,)),
        ),
    ),
    Table(
        7,
        "Groups and rank of LORST",
        ("groups K", "rank r"),
        ("decoder_parameters",),
        ("AP",),
        tuple(
            Row(
                ("1 1 1 1 1 1", str(rank)),
                LORS if rank == 8 else ABLATION.format(f"table7_lorst-rank-{rank}"),
                (p,),
                (ap,),
            )
            for rank, p, ap in ((2, 34, 42.3), (4, 34, 41.9), (8, 35, 42.6), (16, 37, 42.1), (32, 40, 41.7))
        ),
    ),
    Table(
        8,
        "Number of decoder stages",
        ("stages",),
        ("decoder_parameters",),
        ("AP",),
        tuple(
            Row(
                (str(stages),),
                LORS if stages == 6 else ABLATION.format(f"table8_stages-{stages}"),
                (parameters,),
                (ap,),
                note="" if stages == 6 else "the paper does not give K; ours is in the config",
            )
            for stages, parameters, ap in ((3, 28, 38.9), (6, 35, 42.6), (9, 42, 42.0), (12, 50, 41.0))
        ),
    ),
)

TABLE_1 = {
    "LORST": {4: (1.53, 18.3), 8: (1.66, 19.8), 16: (1.93, 23.0), 32: (2.46, 29.3)},
    "LORSA": {4: (0.36, 17.2), 8: (0.39, 18.6), 16: (0.49, 23.3), 32: (0.89, 42.4)},
}
"""Rank -> (M parameters per layer, per cent of the plain 8.39 M and 2.10 M), as the paper gives them."""


def agrees(paper: float, ours: float) -> bool:
    """Whether ours is the paper's whole number, rounded or truncated: the paper does both, 34.56 -> 34, 36.93 -> 37."""
    return paper in (round(ours), math.floor(ours))


class Counts:
    """Counts of the project's configs at 1280 x 800, each model counted once.

    Args:
        root: the project's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._model = cache(
            lambda config: json.dumps(Config.fromfile(root / "configs" / f"{config}.py").model.to_dict())
        )
        self._measure = cache(lambda model: measure(json.loads(model)))
        self._parameters = cache(lambda model: measure(json.loads(model), None))

    def __call__(self, config: str, operations: bool = True) -> Report:
        """The report of a config, or one of its parameters alone, which is faster."""
        return self._measure(self._model(config)) if operations else self._parameters(self._model(config))

    def decoder_parameters(self, config: str, **stage: int) -> float:
        """Millions, with these fields of the stages changed."""
        model = json.loads(self._model(config))
        model["decoder"]["stage"].update(stage)
        return self._parameters(json.dumps(model)).decoder.parameters / 1e6

    def folded(self, config: str) -> Report:
        """The report of a config with LORS, served folded."""
        return self._measure(json.dumps(folded_config(json.loads(self._model(config)))))


def per_layer(kind: str, rank: int) -> tuple[float, float]:
    """(with, without) M parameters per layer of Table 1, biases left out: W_out 32768 -> 256; W_S 128 x 64, K = 2."""
    if kind == "LORST":
        module, plain = LORST(32768, 256, num_layers=6, rank=rank, bias=False), 32768 * 256
    else:
        module, plain = LORSA(256, [(128, 64)], 1, num_layers=6, rank=rank, groups=2), 256 * 128 * 64
    counted = sum(p.numel() for name, p in module.named_parameters() if not name.endswith("bias"))
    return counted / 6 / 1e6, plain / 1e6


def _figures(counts: Counts) -> dict[str, float]:
    """What :data:`REASONS` fill in, in millions or G."""
    reports = {
        "plain100": counts(PLAIN_1X.format(100)),
        "plain300": counts(PLAIN_1X.format(300)),
        "lors100": counts(LORS),
        "lors300": counts(LORS_1X.format(300)),
    }
    gflops = {name: report.decoder.multiply_adds / 1e9 for name, report in reports.items()}
    attention = [reports[name].components["attention"].multiply_adds / 1e9 for name in ("plain100", "plain300")]
    parts = counts(PLAIN_3X.format("swin-s", 300)).parts
    component = {label: cost.parameters / 1e6 for label, cost in reports["lors100"].components.items()}
    own = {label: cost.parameters / 1e6 for label, cost in reports["plain100"].components.items()}
    return dict(
        gflops,
        attention=attention[1] - 3 * attention[0],
        swin=sum(part.multiply_adds for part in parts.values()) / 1e9,
        lors=reports["lors100"].decoder.parameters / 1e6,
        lorst=component["LORST shared"] + component["LORST private"],
        shared=component["LORSA shared"],
        private=component["LORSA private"],
        out_proj=own["own output projections"],
        generators=own["own generators"],
        lorsa_only=counts.decoder_parameters(ABLATION.format("table4_lorsa-only")),
        lorst_only=counts.decoder_parameters(ABLATION.format("table4_lorst-only")),
        lorsa_only_4x32=counts.decoder_parameters(ABLATION.format("table4_lorsa-only"), num_groups=4, in_points=32),
        lorst_only_2x64=counts.decoder_parameters(ABLATION.format("table4_lorst-only"), num_groups=2, in_points=64),
        shared_only=counts.decoder_parameters(ABLATION.format("table5_lorsa-shared-only")),
        private_only=counts.decoder_parameters(ABLATION.format("table5_lorsa-private-only")),
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(header), "|" + "---|" * len(header), *map(_row, rows), ""]


def _rounding(paper: float, paper_percent: float, ours: float, plain: float) -> str:
    """What the paper's rounding does to a cell of Table 1."""
    found = []
    if not agrees(round(100 * paper), 100 * ours):
        found.append(f"rounding: {ours:.4f} M, the paper adds rounded terms")
    if not agrees(round(10 * paper_percent), 1000 * ours / plain):
        divided = 100 * paper / round(plain, 2)
        found.append(f"rounding: the paper divides rounded numbers, {paper} / {plain:.2f} = {divided:.2f} %")
    return "; ".join(found)


def _table_1() -> list[str]:
    header = ["", "r", "M per layer (paper)", "(ours)", "of the plain M", "per cent (paper)", "(ours)", "differs"]
    rows = []
    for kind, ranks in TABLE_1.items():
        for rank, (paper, percent) in ranks.items():
            ours, plain = per_layer(kind, rank)
            cells = [kind, rank, paper, f"{ours:.2f}", f"{plain:.2f}", percent, f"{100 * ours / plain:.1f}"]
            rows.append([*map(str, cells), _rounding(paper, percent, ours, plain)])
    return ["## Table 1: parameters per layer", "", *_grid(header, rows)]


def differences(table: Table, row: Row, report: Report) -> list[str]:
    """Headings of the metrics in which our count is not the paper's number, rounded or truncated."""
    return [
        METRICS[metric][0].removesuffix(", M")
        for metric, paper in zip(table.metrics, row.paper, strict=True)
        if not agrees(paper, METRICS[metric][1](report))
    ]


def _table(table: Table, counts: Counts, numbers: dict[str, int]) -> list[str]:
    header, rows = [*table.labels, "config"], []
    for metric in table.metrics:
        header += [f"{METRICS[metric][0]} (paper)", "(ours)"]
    header += [f"{name} (paper)" for name in table.ap] + ["AP (measured by this project)", "differs"]
    operations = any("gflops" in metric for metric in table.metrics)
    for row in table.rows:
        report = counts(row.config, operations)
        cells = [*row.labels, f"[{Path(row.config).name}](../configs/{row.config}.py)"]
        for metric, paper in zip(table.metrics, row.paper, strict=True):
            _, value, form = METRICS[metric]
            cells += [str(paper), format(value(report), form)]
        differing = differences(table, row, report)
        if bool(differing) != (row.reason is not None):
            raise ValueError(f"table {table.number}, {row.config}: differs in {differing}, reason {row.reason}")
        mark = f"**{', '.join(differing)}** [{numbers[row.reason]}]" if differing else row.note
        rows.append([*cells, *map(str, row.ap), "", mark])
    return [f"## Table {table.number}: {table.title}", "", *_grid(header, rows)]


def _operations(counts: Counts) -> list[str]:
    """Decoder GFLOPs by component, of the four models of Table 2 and of LORS served folded."""
    reports = {
        f"{name}, {queries} queries": report
        for queries in (100, 300)
        for name, report in (
            ("AdaMixer", counts(PLAIN_1X.format(queries))),
            ("LORS", counts(LORS_1X.format(queries))),
            ("LORS folded", counts.folded(LORS_1X.format(queries))),
        )
    }
    rows = []
    for label in COMPONENTS:
        costs = [report.components.get(label) for report in reports.values()]
        if any(cost and cost.multiply_adds > 5e6 for cost in costs):
            rows.append([label, *(f"{cost.multiply_adds / 1e9:.2f}" if cost else "" for cost in costs)])
    rows.append(["**decoder**", *(f"**{report.decoder.multiply_adds / 1e9:.2f}**" for report in reports.values())])
    rows.append(["of these, products", *(f"{report.decoder.products / 1e9:.2f}" for report in reports.values())])
    rows.append(
        [
            "backbone and neck",
            *(f"{sum(p.multiply_adds for p in r.parts.values()) / 1e9:.2f}" for r in reports.values()),
        ]
    )
    rows.append(["**total**", *(f"**{report.total.multiply_adds / 1e9:.2f}**" for report in reports.values())])
    return ["## GFLOPs, operation by operation", "", *_grid(["R-50, 1280 x 800", *reports], rows)]


INTRODUCTION = f"""# The LORS paper's tables, and what the configs of this project build

Made by `{COMMAND}`; a test fails when it is out of date.

- **paper** is what the paper prints, AP included. **No model was trained on COCO by this project**: the column
  "AP (measured by this project)" is empty until someone fills it.
- **ours** is counted from what the config builds. GFLOPs are multiply-adds for one image of 1280 x 800: the products in
  convolutions, matrices and attention, 2 per element of a norm, 4 per bilinear sample, 1 per element of any other
  elementwise operation.
- **differs** marks a row in which ours, rounded or truncated, is not the paper's number, with the number of its reason.
- The reference counts 4 constant position values per query as parameters (400 or 1,200 more in total); we compute them.
"""


def markdown(counts: Counts) -> str:
    """All tables, with our counts beside the paper's.

    Raises:
        ValueError: a row that differs without a reason, or has a reason without differing.
    """
    numbers = {key: number for number, key in enumerate(REASONS, start=1)}
    figures = _figures(counts)
    lines = [INTRODUCTION, *_table_1()]
    for table in TABLES:
        lines += _table(table, counts, numbers)
    lines += ["## Why rows differ", ""]
    lines += [f"[{numbers[key]}] {text.format(**figures, n=numbers)}\n" for key, text in REASONS.items()]
    return "\n".join([*lines, *_operations(counts), *appendix_tables.markdown(counts.root)])
