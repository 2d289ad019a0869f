"""Hooks of the check's runs, which its configs name."""

import json
from contextlib import ExitStack
from pathlib import Path

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner

from .waits import counted


@HOOKS.register_module()
class TraceHook(Hook):
    """Writes a line of JSON per iteration to a file: its number, loss, and the scale of a loss scaler."""

    priority = "VERY_HIGH"  # before what may stop the run

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Write the line."""
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        line = dict(iter=runner.iter, loss=float(outputs["loss"]), scale=scaler and scaler.get_scale())
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


@HOOKS.register_module()
class CountWaitsHook(Hook):
    """Counts the waits of whole iterations, with their data and the other hooks, and writes them to a file."""

    priority = "VERY_HIGH"

    def __init__(self, file: str, first: int, last: int) -> None:
        self.file, self.first, self.last, self.stack = Path(file), first, last, ExitStack()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Begin, or end."""
        if runner.iter == self.first:
            self.found = self.stack.enter_context(counted())
        if runner.iter == self.last:
            self.stack.close()
            self.file.write_text(json.dumps(dict(self.found)))


@HOOKS.register_module()
class DisturbHook(Hook):
    """Raises the loss scale before one iteration, and makes a stage's output NaN from another on."""

    def __init__(self, raise_scale_at: int, nan_at: int) -> None:
        self.raise_scale_at, self.nan_at = raise_scale_at, nan_at

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Disturb."""
        if runner.iter == self.raise_scale_at:
            runner.optim_wrapper.loss_scaler.update(2.0**34)
        if runner.iter == self.nan_at:
            runner.model.decoder.stages[0].ffn.register_forward_hook(lambda m, x, out: out * float("nan"))
