"""The ways to build and run the decoder that the benchmark compares, and what it times them at."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """One way to build and run the decoder."""

    lors: bool = True
    sampling: tuple[int, int] = (2, 64)
    """Groups, points."""
    options: dict = field(default_factory=dict)
    """Overrides of the ``lors`` field."""
    naive: bool = False
    served: bool = False
    """Folded for inference."""


def by_path(adaptive: str, static: str) -> Variant:
    """LORS with both paths fixed."""
    return Variant(options=dict(adaptive=dict(path=adaptive), static=dict(path=static)))


VARIANTS = {
    "plain 4x32": Variant(lors=False, sampling=(4, 32)),
    "plain 2x64": Variant(lors=False),
    "LORS": Variant(),
    "LORS, weights": by_path("weights", "features"),
    "LORS, fold": by_path("fold", "fold"),
    "LORS, served folded": Variant(served=True),
    "naive plain 2x64": Variant(lors=False, naive=True),
    "naive LORS": Variant(naive=True),
}
BASE = "plain 2x64"
WORKS = {
    "inference": "inference",
    "backward": "forward + backward with matching",
    "step": "whole training step (AdamW)",
    "matching": "matching alone, in six stages",
}
