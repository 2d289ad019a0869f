"""Training data in an order and with augmentations that only the seed and the position in the run decide."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_rank
from mmengine.registry import FUNCTIONS
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mmdet_lors.engine.random_state import seeded


class Draw(NamedTuple):
    """One sample of one batch: its index in the data set, and what its random numbers are seeded with."""

    index: Any
    key: tuple[int, ...]


class SeededDataset(Dataset):
    """A data set, indexed by :class:`Draw`: each sample is augmented with random numbers of its own.

    So it does not matter which worker process loads a sample, nor what that process has loaded before. Everything else
    is the inner data set's.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.__dict__["dataset"] = dataset

    def __getitem__(self, draw: Draw) -> Any:
        with seeded(draw.key):
            return self.dataset[draw.index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Not names like __getitems__, by which torch would go around __getitem__; nor before unpickling has finished.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)


class ResumableBatches(BatchSampler):
    """The batches of another batch sampler, as :class:`Draw` s, from batch ``start`` on: once, then from 0 again.

    Args:
        batches: the batch sampler; it is asked for the skipped batches as well, but nobody loads them.
        seed: of the run.
    """

    def __init__(self, batches: BatchSampler, seed: int) -> None:
        self.batches = batches
        self.sampler = batches.sampler
        self.batch_size = batches.batch_size
        self.drop_last = batches.drop_last
        self.seed = seed
        self.start = 0

    def __iter__(self) -> Iterator[list[Draw]]:
        start, self.start = self.start, 0
        position = (self.seed, getattr(self.sampler, "epoch", 0), get_rank())
        for number, batch in enumerate(self.batches):
            if number >= start:
                yield [Draw(index, (*position, number, place)) for place, index in enumerate(batch)]

    def __len__(self) -> int:
        return len(self.batches)


class ResumableLoader(DataLoader):
    """A data loader that can begin in the middle of an epoch, and whose samples are seeded one by one."""

    @classmethod
    def of(cls, loader: DataLoader, seed: int) -> "ResumableLoader":
        """The same loader, with its data set and batch sampler made resumable."""
        return cls(
            SeededDataset(loader.dataset),
            batch_sampler=ResumableBatches(loader.batch_sampler, seed),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            # Of its own, so that starting an epoch draws nothing from the generator that the model uses.
            generator=torch.Generator(),
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __iter__(self) -> Iterator[Any]:
        # A generator: the workers start to load with the first batch that is asked for, when `start` is known.
        yield from super().__iter__()


@FUNCTIONS.register_module()
def outlive_sigterm(worker_id: int) -> None:
    """Start of a data worker that only its own parent can stop.

    A scheduler sends SIGTERM to every process of a job. A worker that died of it would take the iteration with it that
    the training process wants to finish. Where a process is not told who sent a signal (macOS, Windows), its worker
    dies of it, and the run goes on from its newest checkpoint.
    """
    if not (hasattr(signal, "sigwaitinfo") and hasattr(signal, "pthread_sigmask")):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
