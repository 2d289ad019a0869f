"""Processes that work apart, and only wait for each other."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, rendezvous

from .network import let_gloo_find_its_interface
from .restarts import restarts


class Apart:
    """The processes of one run. They are no group of torch's, in which mmengine draws in the first process alone.

    Args:
        launcher: 'pytorch' if torchrun has started several processes, else 'none'.
    """

    def __init__(self, launcher: str = "none") -> None:
        self.rank, self.world = 0, 1
        self._group = None
        if launcher != "none":
            let_gloo_find_its_interface()
            store, self.rank, self.world = next(rendezvous("env://"))
            store = PrefixStore(f"apart_{restarts()}", store)
            # However long the others take.
            self._group = ProcessGroupGloo(store, self.rank, self.world, timedelta(days=365))

    def sum(self, numbers: Sequence[int] = (0,)) -> list[int]:
        """Wait until all processes call this; returns the sums of their numbers."""
        values = torch.tensor(numbers)
        if self._group is not None:
            self._group.allreduce([values]).wait()
        return values.tolist()
