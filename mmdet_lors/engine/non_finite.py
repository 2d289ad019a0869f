"""Stops a run that computes NaN or infinity, reports the images and the first such tensor, and keeps the weights."""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, all_reduce, get_rank, is_distributed
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.nn.utils import get_total_norm
from torch.utils.data import BatchSampler

from mmdet_lors.errors import UserError

from .first_non_finite import first_non_finite
from .random_state import random_state, set_random_state

SHOWN = 8
"""How many images of a batch the error names; the log names all."""


@HOOKS.register_module()
class StopOnNonFiniteHook(Hook):
    """Watches the loss and gradient norm of every training step.

    A step whose gradient is not finite updates nothing. All processes stop together after ``patience`` steps in a row
    with a non-finite loss or gradient. A loss scaler (``AmpOptimWrapper``) finds its scale by steps with a finite loss
    and a gradient that overflows: such steps have their own limit.

    ``grad_norm`` is logged even if the optimizer wrapper has no ``clip_grad``.

    Args:
        patience: steps in a row, 1 or more.
        max_skipped_steps: steps in a row that the loss scaler may skip; its scale starts at 2**16 and halves each time.

    Raises:
        UserError: a setting below 1; when the run stops: loss or norm, images, and the first non-finite tensor.
    """

    priority = "ABOVE_NORMAL"  # before what logs, saves and averages

    def __init__(self, patience: int = 1, max_skipped_steps: int = 32) -> None:
        for name, value in (("patience", patience), ("max_skipped_steps", max_skipped_steps)):
            if type(value) is not int or value < 1:
                raise UserError(f"StopOnNonFiniteHook.{name} must be 1 or more, got {value!r}")
        self.patience, self.max_skipped_steps = patience, max_skipped_steps
        self.failed = self.skipped = 0
        self.norm: float | None = None
        self.batch, self.batch_idx, self.random_state = None, 0, None

    def before_train(self, runner: Runner) -> None:
        """Watch the optimizer and the training step.

        Raises:
            UserError: there are several optimizers.
        """
        if not hasattr(runner.optim_wrapper, "optimizer"):
            raise UserError("StopOnNonFiniteHook watches one optimizer; optim_wrapper has several")
        self.handle = runner.optim_wrapper.optimizer.register_step_pre_hook(
            lambda optimizer, *_: self._before_step(runner, optimizer)
        )
        runner.model.train_step = self._watched(runner, runner.model.train_step)

    def after_train(self, runner: Runner) -> None:
        """Stop watching."""
        self.handle.remove()
        del runner.model.train_step

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Store what is needed to run this step again."""
        self.norm, self.batch, self.batch_idx = None, data_batch, batch_idx
        self.random_state = random_state()
        # A single forward pass on NaN corrupts running statistics for good.
        self.buffers = [buffer.clone() for buffer in runner.model.buffers()] if self.patience > 1 else []

    def _before_step(self, runner: Runner, optimizer: torch.optim.Optimizer) -> None:
        """Record the norm, and drop non-finite gradients: an optimizer then changes neither weights nor its state."""
        wrapper = runner.optim_wrapper
        if wrapper.clip_grad_kwargs and wrapper.grad_name == "grad_norm":
            self.norm = float(wrapper.message_hub.get_scalar("train/grad_norm").current())
        else:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            scale = getattr(optimizer, "grad_scale", None)
            if scale is not None:  # a fused optimizer with a loss scaler divides by the scale only later
                grads = [grad / scale.to(grad.device) for grad in grads]
            self.norm = float(get_total_norm(grads))
            wrapper.message_hub.update_scalar("train/grad_norm", self.norm)
        if not math.isfinite(self.norm):
            optimizer.zero_grad(set_to_none=True)

    def _watched(self, runner: Runner, train_step: Callable) -> Callable:
        """Report a step that fails, as Hungarian matching does on NaN, by its images, and by NaN if that is why."""

        def step(*args, **kwargs):
            try:
                return train_step(*args, **kwargs)
            except (UserError, torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                images = self._images(runner)
                try:
                    found = self._find(runner)
                except RuntimeError:  # a GPU that has failed cannot run anything again
                    found = []
                if not found:
                    print_log(f"the training step failed on images {', '.join(images)}", "current", logging.ERROR)
                    raise
                reason = f"{type(error).__name__} ({' '.join(str(error).split())[:80]})"
                raise UserError(self._line(runner, f"the training step failed with {reason}", images, found)) from error

        return step

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Count non-finite steps, and stop the run at the limit.

        Raises:
            UserError: the limit is reached.
        """
        loss = torch.as_tensor((outputs or {}).get("loss", 0.0)).item()
        updating = runner.optim_wrapper.should_update()
        here = not math.isfinite(loss), updating and (self.norm is None or not math.isfinite(self.norm))
        lost, skipped = _anywhere(*here)
        if not (lost or skipped):
            # A step that only accumulates gradients does not test the loss scale.
            self.failed, self.skipped = 0, 0 if updating else self.skipped
            return
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        if lost or scaler is None:
            self.failed += 1
            what, enough = "loss" if lost else "gradient norm", self.failed >= self.patience
        else:
            self.skipped += 1
            what, enough = "scaled gradient", self.skipped >= self.max_skipped_steps
        value = loss if lost else self.norm if self.norm is not None else math.inf
        text = f"{what} is {value}"
        if what == "scaled gradient":
            text = f"scaled gradient is not finite {self.skipped} times in a row; loss scale {scaler.get_scale():g}"
        if not enough:
            level = logging.INFO if what == "scaled gradient" else logging.WARNING
            print_log(f"{text} on images {', '.join(self._images(runner))}: weights not updated", "current", level)
            for buffer, before in zip(runner.model.buffers(), self.buffers, strict=bool(self.buffers)):
                buffer.copy_(before)
            return
        images, found = self._images(runner), self._find(runner)
        reports = all_gather_object((lost and here[0], text, images, found))
        # Report the process whose own numbers are bad, by its loss or by what running the step again found.
        rank, (_, text, images, found) = min(
            enumerate(reports), key=lambda item: (not item[1][0], not item[1][3], item[0])
        )
        process = f" in process {rank}" if len(reports) > 1 else ""
        raise UserError(self._line(runner, text + process, images, found, log=rank == get_rank()))

    def _find(self, runner: Runner) -> list[str]:
        """Run the step again, with the same random numbers."""
        set_random_state(self.random_state)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        context = runner.optim_wrapper.optim_context(model)
        return first_non_finite(model, self.batch, context, scaler.get_scale() if scaler else 1.0)

    def _line(self, runner: Runner, text: str, images: Sequence[str], found: Sequence[str], log: bool = True) -> str:
        """The error message; its details are logged."""
        where = f"at epoch {runner.epoch + 1}, iteration {runner.iter + 1}"
        first = found[0] if found else "nothing when the step was run again"
        if log:
            details = "".join(f"\n  {line}" for line in found)
            print_log(f"{text} {where}\nimages: {', '.join(images)}\nnot finite:{details}", "current", logging.ERROR)
        more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
        return f"{text} {where}, on images {', '.join(images[:SHOWN])}{more}; first non-finite: {first}"

    def _images(self, runner: Runner) -> list[str]:
        """Ids and paths of the batch's images, or their places in the data set."""
        samples = self.batch.get("data_samples") if isinstance(self.batch, dict) else None
        if isinstance(samples, list) and all(hasattr(sample, "img_path") for sample in samples):
            ids = [sample.get("img_id") for sample in samples]
            paths = [sample.img_path for sample in samples]
            return [path if i is None else f"{i} ({path})" for i, path in zip(ids, paths, strict=True)]
        loader = runner.train_dataloader
        batches = getattr(loader.batch_sampler, "batches", loader.batch_sampler)  # inside ResumableBatches
        if type(batches) is not BatchSampler or not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return [f"of batch {self.batch_idx}"]
        # mmengine's sampler gives the same order again within an epoch.
        indices = next(islice(batches, self.batch_idx, None), [])
        name = getattr(loader.dataset, "image_name", lambda index: f"at place {index}")
        return [name(index) for index in indices]


def _anywhere(*flags: bool) -> list[bool]:
    """Which of these are true in any process."""
    if not is_distributed():
        return list(flags)
    summed = torch.tensor([float(flag) for flag in flags])
    all_reduce(summed)
    return (summed > 0).tolist()
