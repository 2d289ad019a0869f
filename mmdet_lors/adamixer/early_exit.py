"""Early exit: a trained decoder that predicts with fewer of its stages, and with fewer queries from stage to stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmdet_lors.errors import UserError

from .stage import StageOutput


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class EarlyExit:
    """How far a decoder goes when it predicts; training always goes all the way.

    Args:
        num_stages: s, the stages that run.
        keep_queries: after stage i the ``keep_queries[i]`` queries with the highest class score go on to the next; s -
            1 numbers, or none to keep all queries.

    Raises:
        UserError: a number of stages below 1; numbers of queries that are not s - 1, below 1, or that grow.
    """

    num_stages: int
    keep_queries: Sequence[int] = ()

    def __post_init__(self) -> None:
        kept, stages = self.keep_queries, self.num_stages
        if not _whole(stages) or stages < 1:
            raise UserError(f"test_cfg.num_stages must be a whole number from 1, got {stages!r}")
        if not isinstance(kept, Sequence) or not all(_whole(n) and n >= 1 for n in kept):
            raise UserError(f"test_cfg.keep_queries must be a list of whole numbers from 1, got {kept!r}")
        if kept and len(kept) != stages - 1:
            raise UserError(
                f"test_cfg.keep_queries has {len(kept)} numbers; {stages} stages need {stages - 1}, one per stage that "
                "another follows"
            )
        if list(kept) != sorted(kept, reverse=True):
            raise UserError(f"test_cfg.keep_queries {list(kept)} must not grow: queries that are gone do not come back")

    def next(self, stage: int, output: StageOutput) -> tuple[Tensor, Tensor]:
        """Positions (B, n, 4) and content (B, n, d) of the queries that go on from a stage to the next."""
        if stage >= len(self.keep_queries):
            return output.xyzr, output.content
        best = output.cls_score.amax(dim=2).topk(self.keep_queries[stage], dim=1).indices[..., None]
        xyzr, content = (x.gather(1, best.expand(-1, -1, x.shape[2])) for x in (output.xyzr, output.content))
        return xyzr, content
