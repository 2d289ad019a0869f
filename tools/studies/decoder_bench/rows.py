"""The rows of the decoder study, and the paper's claims about them."""

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Bench:
    """What all runs have in common."""

    iterations: int = 3000
    batch_size: int = 16
    learning_rate: float = 5e-4
    queries: int = 8
    train_images: int = 3000
    val_images: int = 1000
    size: int = 96
    feature_epochs: int = 14


@dataclass(frozen=True)
class Row:
    """One row of the study: how its decoder differs from the plain one, and how its training does."""

    name: str
    what: str
    decoder: dict = field(default_factory=dict)
    """Settings below ``model.decoder``, by dotted name."""
    seeds: int = 3
    optimizer: dict = field(default_factory=dict)
    """``custom_keys`` of the optimizer's ``paramwise_cfg``: part of a parameter's name -> lr_mult, decay_mult."""
    initial_A: float = 1.0  # noqa: N815
    """Factor of the private A's as they start."""
    length: float = 1.0
    """Iterations, relative to the other rows'."""
    warm_up: float = 0.03
    """Share of the iterations in which the learning rate rises."""
    warm_start: bool = False
    """Whether the first half of the iterations trains the plain decoder, and the second starts from it."""


ADAPTIVE, STATIC = dict(rank=4, groups=[1, 1, 2, 2, 3, 3]), dict(rank=2, groups=1)
"""As large beside a mixing of 32 channels and a content of 64 as the paper's 16 and 8 beside 128 and 256."""


def lors(adaptive: dict | None = ADAPTIVE, static: dict | None = STATIC, **changes: object) -> dict:
    """Decoder settings of LORS; ``changes`` are the adaptive half's."""
    return {"lors": dict(adaptive=adaptive and dict(adaptive, **changes), static=static)}


def plain(**stage: int) -> dict:
    """Decoder settings of a plain decoder with another stage."""
    return {f"stage.{name}": value for name, value in stage.items()}


def faster(times: float, of: str = ".private.") -> dict:
    """Optimizer settings for another learning rate of the parameters whose names have ``of`` in them."""
    return {of: dict(lr_mult=times)}


PLAIN, LORS = "plain", "LORS"
ROWS = [
    Row(PLAIN, "2 groups of 16 points", seeds=5),
    Row(LORS, "LORSA rank 4, K = 1 1 2 2 3 3; LORST rank 2", lors(), seeds=5),
    Row("plain 4x8", "4 groups of 8 points", plain(num_groups=4, in_points=8)),
    Row("plain, 16 channels", "16 feature channels, 16 output points", plain(feat_channels=16, out_points=16)),
    Row("plain, 32 channels", "32 feature channels, 8 output points", plain(feat_channels=32, out_points=8)),
    Row("plain, 2 stages", "two stages", {"num_stages": 2}),
    Row("LORSA only", "output projections of their own", lors(static=None)),
    Row("LORST only", "generators of their own", lors(adaptive=None)),
    Row("shared only", "no private part in LORSA", lors(groups=0)),
    Row("private only", "no shared part in LORSA", lors(shared=False)),
    Row("LORSA r2 K1", "LORSA rank 2, K = 1", lors(rank=2, groups=1)),
    Row("LORSA r4 K1", "LORSA rank 4, K = 1", lors(groups=1)),
    Row("LORSA r4 K2", "LORSA rank 4, K = 2", lors(groups=2)),
    Row("LORSA r8 K1", "LORSA rank 8, K = 1", lors(rank=8, groups=1)),
    Row("LORST r1", "LORST rank 1", lors(static=dict(STATIC, rank=1))),
    Row("LORST r4", "LORST rank 4", lors(static=dict(STATIC, rank=4))),
    Row("LORST r8", "LORST rank 8", lors(static=dict(STATIC, rank=8))),
    Row("LORS, 3 stages", "K = 1 2 3", {"num_stages": 3} | lors(groups=[1, 2, 3])),
    Row("LORS, 9 stages", "K = 1 1 1 2 2 2 3 3 3", {"num_stages": 9} | lors(groups=[1, 1, 1, 2, 2, 2, 3, 3, 3])),
    Row("Kaiming", "LORSA's shared generator starts Kaiming-uniform", lors(shared_init="kaiming")),
    Row("warm start", "half of the iterations plain, half LORS from it", lors(), warm_start=True),
    Row("private lr x2", "learning rate of A, B and E", lors(), optimizer=faster(2)),
    Row("private lr x4", "learning rate of A, B and E", lors(), optimizer=faster(4)),
    Row("private lr x8", "learning rate of A, B and E", lors(), optimizer=faster(8)),
    Row("B lr x16", "learning rate of B alone, as in LoRA+", lors(), optimizer=faster(16, ".B")),
    Row("1 / sqrt(r)", "A and its learning rate halved, which is B E A / sqrt(4)", lors(), initial_A=0.5,
        optimizer=faster(0.5, ".A")),
    Row("no private decay", "no weight decay of A, B and E", lors(), optimizer={".private.": dict(decay_mult=0)}),
    Row("long warm-up", "learning rate rises for 15 % of the iterations", lors(), warm_up=0.15),
    Row("plain, long warm-up", "learning rate rises for 15 % of the iterations", seeds=2, warm_up=0.15),
    Row("plain, lr / 2", "learning rate of everything", seeds=1, optimizer=faster(0.5, "")),
    Row("LORS, lr / 2", "learning rate of everything", lors(), seeds=1, optimizer=faster(0.5, "")),
    Row("plain, lr x2", "learning rate of everything", seeds=1, optimizer=faster(2, "")),
    Row("LORS, lr x2", "learning rate of everything", lors(), seeds=1, optimizer=faster(2, "")),
    Row("plain, twice as long", "twice the iterations", length=2),
    Row("LORS, twice as long", "twice the iterations", lors(), length=2),
]  # fmt: skip


class Claim(NamedTuple):
    """A sentence of the paper, or of its reader, as two rows of the study."""

    table: str
    text: str
    row: str
    base: str
    reaches: bool = False
    """Whether it says that ``row`` reaches what ``base`` does; else that it reaches more."""


CLAIMS = [
    Claim("2", "LORS reaches plain AdaMixer's AP with a third of its decoder parameters", LORS, PLAIN, True),
    Claim("4", "LORSA alone reaches plain AdaMixer's AP", "LORSA only", PLAIN, True),
    Claim("4", "LORST alone reaches plain AdaMixer's AP", "LORST only", PLAIN, True),
    Claim("5", "LORSA needs its private part", LORS, "shared only"),
    Claim("5", "LORSA needs its shared part", LORS, "private only"),
    Claim("6", "LORSA's rank 16 (here 4) is better than 8 (2)", "LORSA r4 K1", "LORSA r2 K1"),
    Claim("6", "LORSA's rank 16 (here 4) is better than 32 (8)", "LORSA r4 K1", "LORSA r8 K1"),
    Claim("6", "two groups are better than one", "LORSA r4 K2", "LORSA r4 K1"),
    Claim("6", "groups that grow with depth are better than two everywhere", LORS, "LORSA r4 K2"),
    Claim("7", "LORST's rank 8 (here 2) is better than 4 (1)", LORS, "LORST r1"),
    Claim("7", "LORST's rank 8 (here 2) is better than 16 (4)", LORS, "LORST r4"),
    Claim("7", "LORST's rank 8 (here 2) is better than 32 (8)", LORS, "LORST r8"),
    Claim("8", "six stages are better than three", LORS, "LORS, 3 stages"),
    Claim("8", "six stages are better than nine", LORS, "LORS, 9 stages"),
    Claim("-", "LORS is better than a plain decoder made as small by 16 channels", LORS, "plain, 16 channels"),
    Claim("-", "LORS is better than one made as small by 32 channels and fewer points", LORS, "plain, 32 channels"),
    Claim("-", "LORS is better than one made as small by fewer stages", LORS, "plain, 2 stages"),
]  # fmt: skip
