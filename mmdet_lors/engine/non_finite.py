"""Stops a run that computes NaN or infinity, reports the images and the first such tensor, and keeps the weights."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import islice
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, all_reduce, get_rank, is_distributed
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.data import BatchSampler

from mmdet_lors.errors import UserError

from .build import bare
from .first_non_finite import first_non_finite
from .random_state import random_state, set_random_state

SHOWN = 8
"""How many images of a batch the error names; the log names all."""


@HOOKS.register_module()
class StopOnNonFiniteHook(Hook):
    """Watches the loss and gradient norm of every training step.

    A step whose gradient is not finite updates nothing. The host has to know that before the optimizer's step: there it
    waits for the device, once per update, and all that is logged comes in the same transfer. All processes stop
    together after ``patience`` steps in a row with a non-finite loss or gradient. A loss scaler (``AmpOptimWrapper``)
    finds its scale by steps with a finite loss and a gradient that overflows: such steps have their own limit.

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
        self.norm: float | Tensor | None = None
        self.log_vars: dict[str, Any] = {}
        self.on_host: dict[str, Any] | None = None
        self.batch, self.batch_idx, self.random_state = None, 0, None

    def before_train(self, runner: Runner) -> None:
        """Watch the optimizer and the training step.

        Raises:
            UserError: there are several optimizers.
        """
        if not hasattr(runner.optim_wrapper, "optimizer"):
            raise UserError("StopOnNonFiniteHook watches one optimizer; optim_wrapper has several")
        wrapper, model = runner.optim_wrapper, bare(runner.model)
        self.handle = wrapper.optimizer.register_step_pre_hook(
            lambda optimizer, *_: self._before_step(runner, optimizer)
        )
        runner.model.train_step = self._watched(runner, runner.model.train_step)
        if hasattr(model, "parse_losses"):
            model.parse_losses = self._noting_losses(model.parse_losses)
        if wrapper.clip_grad_kwargs:
            wrapper.clip_func = self._noting_norm(wrapper.clip_func)

    def after_train(self, runner: Runner) -> None:
        """Stop watching."""
        self.handle.remove()
        wrapper, model = runner.optim_wrapper, bare(runner.model)
        del runner.model.train_step
        vars(model).pop("parse_losses", None)
        if wrapper.clip_grad_kwargs:
            wrapper.clip_func = wrapper.clip_func.__wrapped__

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Store what is needed to run this step again."""
        self.norm, self.log_vars, self.on_host = None, {}, None
        self.batch, self.batch_idx = data_batch, batch_idx
        self.random_state = random_state()
        # A single forward pass on NaN corrupts running statistics for good.
        self.buffers = [buffer.clone() for buffer in runner.model.buffers()] if self.patience > 1 else []

    def _noting_losses(self, parse_losses: Callable) -> Callable:
        """Keep what is to be logged, in the very dict that the training step returns."""

        @wraps(parse_losses)
        def noting(losses):
            loss, self.log_vars = parse_losses(losses)
            return loss, self.log_vars

        return noting

    def _noting_norm(self, clip: Callable) -> Callable:
        """Keep the norm, and from mmengine, which would wait for its value."""

        @wraps(clip)
        def noting(*args, **kwargs):
            self.norm = clip(*args, **kwargs)

        return noting

    def _before_step(self, runner: Runner, optimizer: torch.optim.Optimizer) -> None:
        """Read the norm, and drop non-finite gradients: an optimizer then changes neither weights nor its state."""
        if self.norm is None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            scale = getattr(optimizer, "grad_scale", None)
            if scale is not None:  # a fused optimizer with a loss scaler divides by the scale only later
                grads = [grad / scale.to(grad.device) for grad in grads]
            self.norm = get_total_norm(grads)
        self._read(runner, self.log_vars)
        if not math.isfinite(self.norm):
            optimizer.zero_grad(set_to_none=True)

    def _read(self, runner: Runner, log_vars: dict[str, Any]) -> None:
        """Bring the norm and the tensors that are to be logged to the host, in one transfer."""
        norm = {} if self.norm is None or isinstance(self.norm, float) else {None: self.norm}
        tensors = norm | {key: value for key, value in log_vars.items() if isinstance(value, Tensor)}
        here = next(iter(tensors.values())).device if tensors else None
        tensors = {key: value for key, value in tensors.items() if value.numel() == 1 and value.device == here}
        if not tensors:
            return
        # On the CPU they stay tensors, as other hooks expect.
        host = dict(zip(tensors, torch.cat([t.detach().reshape(1) for t in tensors.values()]).cpu(), strict=True))
        if norm:
            self.norm = float(host.pop(None))
            runner.message_hub.update_scalar("train/grad_norm", self.norm)
        log_vars.update(host)
        self.on_host = log_vars

    def _watched(self, runner: Runner, train_step: Callable) -> Callable:
        """Read what is to be logged at once. Report a step that fails by its images, and by NaN if that is why.

        Hungarian matching fails on NaN.
        """

        def step(*args, **kwargs):
            try:
                outputs = train_step(*args, **kwargs)
                if outputs is not self.on_host:  # nothing was updated
                    self._read(runner, outputs or {})
                return outputs
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
        model = bare(runner.model)
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
