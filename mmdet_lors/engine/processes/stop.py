"""Stopping on SIGTERM: all processes of a run stop together, after the same iteration."""

import os
import signal
import threading

import torch
from mmengine.dist import is_distributed
from torch import distributed as dist

from .network import let_gloo_find_its_interface

TOLD_TO_STOP = "MMDET_LORS_TOLD_TO_STOP"
"""Set by the launcher once it has received SIGTERM: a process that it restarts afterwards ends at once."""


class Stopped(SystemExit):
    """The run stops because it received SIGTERM; exit status 0.

    Args:
        checkpoint: what it can be resumed from, or None before training began.
    """

    def __init__(self, checkpoint: str | None = None) -> None:
        super().__init__(0)
        self.checkpoint = checkpoint


def _stop_now(*_) -> None:
    raise Stopped


def stop_at_once() -> None:
    """End the process on SIGTERM, until training begins: there is nothing to save yet.

    Raises:
        Stopped: the launcher has already received SIGTERM.
    """
    signal.signal(signal.SIGTERM, _stop_now)
    if TOLD_TO_STOP in os.environ:
        raise Stopped


class StopRequest:
    """Whether any process of the run has received SIGTERM."""

    def __init__(self) -> None:
        self.received = False
        self.listening = False
        self._group = None
        self._before = None

    def listen(self) -> None:
        """Record SIGTERM from now on; called by all processes."""
        self.listening = True
        if is_distributed() and dist.get_backend() != "gloo":
            # Over gloo, even if NCCL is in use: it does not wait for queued GPU work.
            let_gloo_find_its_interface()
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def ignore(self) -> None:
        """Restore the previous handler of SIGTERM."""
        self.listening = False
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, *_) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether to stop: the same answer in all processes, each of which must call this."""
        return bool(self.largest(self.received))

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers; each must call this."""
        if not is_distributed():
            return int(number)
        value = torch.tensor(int(number))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)
