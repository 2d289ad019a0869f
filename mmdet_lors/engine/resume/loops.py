"""mmengine's training loops, able to go on in the middle of an epoch without loading data again."""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from mmdet_lors.engine.random_state import set_random_state

from .data_order import ResumableLoader


class _ResumableLoop:
    """What both loops share; the hook that wrote the checkpoint calls :meth:`go_on`."""

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, **settings: Any) -> None:
        if isinstance(dataloader, dict):
            differ = runner._randomness_cfg.get("diff_rank_seed", False)
            dataloader = runner.build_dataloader(dataloader, seed=runner.seed, diff_rank_seed=differ)
        super().__init__(runner, ResumableLoader.of(dataloader, runner.seed), **settings)
        self._first = 0
        self._random_state: dict | None = None

    def go_on(self, batch: int, random_state: dict | None) -> None:
        """Begin after ``batch`` batches of this epoch, if the loop has epochs, with these random numbers."""
        self._first = self.dataloader.batch_sampler.start = batch
        self._random_state = random_state

    def _restore(self) -> None:
        # As late as that: what hooks draw before an epoch, an uninterrupted run has drawn before its checkpoint.
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def validation_is_due(self, batch: int) -> bool:
        """Whether an uninterrupted run would validate now, after its checkpoint."""
        self._decide_current_val_interval()
        now, last = self._progress(batch)
        return (
            self.runner.val_loop is not None
            and now is not None
            and now >= self.val_begin
            and (now % self.val_interval == 0 or now == last)
        )


@LOOPS.register_module()
class ResumableEpochLoop(_ResumableLoop, EpochBasedTrainLoop):
    """``EpochBasedTrainLoop`` that goes on with the next iteration of the same epoch."""

    def run_epoch(self) -> None:
        """One epoch, or what is left of it."""
        super().run_epoch()
        self._first = 0

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """One iteration, counted from the epoch's beginning."""
        self._restore()
        super().run_iter(self._first + idx, data_batch)

    def _progress(self, batch: int) -> tuple[int | None, int]:
        return None if batch else self._epoch, self._max_epochs


@LOOPS.register_module()
class ResumableIterLoop(_ResumableLoop, IterBasedTrainLoop):
    """``IterBasedTrainLoop`` that skips what it has trained on by index, for an infinite or a finite sampler."""

    def run(self) -> Any:
        """Train; mmengine's loop asks for as many batches as are to be skipped first, and gets empty ones."""
        self.dataloader_iterator = chain(repeat(None, self._iter), self._remaining(self.dataloader_iterator))
        return super().run()

    def _remaining(self, endless: Iterator[Any]) -> Iterator[Any]:
        """Batches from this iteration on. A finite sampler's epochs are not the loop's, which has one."""
        batches = self.dataloader.batch_sampler
        batches.start = self._iter
        if hasattr(batches.sampler, "epoch"):
            endless._epoch, batches.start = divmod(self._iter, len(batches))
            batches.sampler.set_epoch(endless._epoch)
        yield from endless

    def run_iter(self, data_batch: Sequence[dict]) -> None:
        """One iteration."""
        self._restore()
        super().run_iter(data_batch)

    def _progress(self, batch: int) -> tuple[int, int]:
        return self._iter, self._max_iters
