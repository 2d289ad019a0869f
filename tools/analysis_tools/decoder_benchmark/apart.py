"""What is timed, in a process of its own: no other case has used its heap."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context

import torch
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger

from mmdet_lors.analysis.timing import Observed, observed
from mmdet_lors.engine.cpu import keep_memory
from mmdet_lors.engine.machine import peak_resident
from mmdet_lors.errors import UserError

FRESH = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
"""How a process starts: where it can, forked from one that has imported everything and done nothing."""
FRESH.set_forkserver_preload(["mmdet_lors.adamixer", "mmdet_lors.analysis.complexity", "mmdet.apis", "mmdet.engine"])
Timed = Callable[[], float]
_timed: Timed


class Apart:
    """What is timed, in a process of its own, which waits between two calls.

    Args:
        build: makes what does its work once and returns the seconds, and knows its ``device``, such as a ``Case``.
        threads: of torch, on a CPU.
        keep: whether freed memory stays in the process, see :func:`keep_memory`.
        device: 'cpu' or 'cuda'.
        fixed: further arguments of ``build``.

    Raises:
        UserError: the process was killed.
    """

    def __init__(self, build: Callable[..., Timed], threads: int, keep: bool, device: str, **fixed) -> None:
        self.seen: list[Observed] = []
        self._pool = ProcessPoolExecutor(1, FRESH)
        self._ask(_start, build, threads, keep, device, fixed)

    def _ask(self, question, *arguments: object):
        try:
            return self._pool.submit(question, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError("the process of one variant was killed; is there enough memory?") from error

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()

    def __call__(self) -> float:
        """Do the work once; returns its seconds."""
        self.seen.append(self._ask(observed, _timed_once))
        return self.seen[-1].seconds

    def peak(self) -> float:
        """GB so far: resident memory on a CPU, allocated memory on a GPU."""
        return self._ask(_peak) / 1e9


def _start(build: Callable[..., Timed], threads: int, keep: bool, device: str, fixed: dict) -> None:
    global _timed
    torch.set_num_threads(threads)
    register_all_modules()
    MMLogger.get_current_instance().setLevel("WARNING")
    if keep:
        keep_memory()
    _timed = build(device=device, **fixed)


def _timed_once() -> float:
    return _timed()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if _timed.device == "cuda" else peak_resident()
