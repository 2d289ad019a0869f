"""Stops a run that computes NaN or infinity, reports the images and the first such tensor, and keeps the weights."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, all_reduce, get_rank
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.data import BatchSampler

from mmdet_lors.errors import UserError
from mmdet_lors.transfer import ToHost

from .build import bare
from .first_non_finite import first_non_finite
from .late_hooks import ReadLateHook
from .random_state import random_state, set_random_state

SHOWN = 8
"""How many images of a batch the error names; the log names all."""


class Step(NamedTuple):
    """A training step of which the host does not know yet whether it was finite."""

    epoch: int
    iter: int
    batch_idx: int
    batch: Any
    random_state: dict
    """Before it: with the same random numbers it can be run again."""
    updating: bool = False
    """Whether the weights were to be updated, and not only gradients accumulated."""
    numbers: ToHost | None = None
    """Loss, gradient norm, and whether any process has a non-finite loss, or norm."""


@HOOKS.register_module()
class StopOnNonFiniteHook(ReadLateHook):
    """Watches the loss and gradient norm of every training step.

    A step whose gradient is not finite updates nothing: a fused optimizer finds that on the device, before others the
    host waits for the norm. All processes stop together after ``patience`` steps in a row with a non-finite loss or
    gradient. The host learns of them a step later (:class:`ReadLateHook`), until when nothing is updated; with a
    patience above 1 it waits for every step. A loss scaler (``AmpOptimWrapper``) finds its scale by steps with a finite
    loss and a gradient that overflows: such steps have their own limit.

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

    def before_train(self, runner: Runner) -> None:
        """Watch the optimizer and the training step.

        Raises:
            UserError: there are several optimizers.
        """
        if not hasattr(runner.optim_wrapper, "optimizer"):
            raise UserError("StopOnNonFiniteHook watches one optimizer; optim_wrapper has several")
        wrapper = runner.optim_wrapper
        self.stopping: Tensor | bool = False
        self.scaler = getattr(wrapper, "loss_scaler", None)
        self.handle = wrapper.optimizer.register_step_pre_hook(lambda optimizer, *_: self._guard(optimizer))
        runner.model.train_step = self._watched(runner, runner.model.train_step)
        if wrapper.clip_grad_kwargs:
            wrapper.clip_func = self._noting_norm(wrapper.clip_func)

    def after_train(self, runner: Runner) -> None:
        """Stop watching."""
        super().after_train(runner)
        wrapper = runner.optim_wrapper
        self.handle.remove()
        vars(wrapper.optimizer).pop("found_inf", None)
        del runner.model.train_step
        if wrapper.clip_grad_kwargs:
            wrapper.clip_func = wrapper.clip_func.__wrapped__

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Store what is needed to run this step again."""
        self.norm: Tensor | None = None
        self.step = Step(runner.epoch, runner.iter, batch_idx, data_batch, random_state())
        # A single forward pass on NaN corrupts running statistics for good.
        self.buffers = [buffer.clone() for buffer in runner.model.buffers()] if self.patience > 1 else []

    def _noting_norm(self, clip: Callable) -> Callable:
        """Keep the norm, and from mmengine, which would wait for its value."""

        @wraps(clip)
        def noting(*args, **kwargs):
            self.norm = clip(*args, **kwargs)

        return noting

    def _guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the optimizer's step: if the norm is not finite, change neither weights nor the optimizer's state."""
        if self.norm is None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            scale = getattr(optimizer, "grad_scale", None)
            if scale is not None:  # a fused optimizer with a loss scaler divides by the scale only later
                grads = [grad / scale.to(grad.device) for grad in grads]
            self.norm = get_total_norm(grads)
        bad = ~self.norm.isfinite() | self.stopping
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: reads found_inf, which loss scalers set
            scalers = getattr(optimizer, "found_inf", bad) if self.scaler else bad
            optimizer.found_inf = bad.float().maximum(scalers.float())
        elif bad:
            optimizer.zero_grad(set_to_none=True)

    def _watched(self, runner: Runner, train_step: Callable) -> Callable:
        """Log the norm. Report a step that fails by its images, and by NaN if that is why.

        Hungarian matching fails on NaN.
        """

        def step(*args, **kwargs):
            try:
                outputs = train_step(*args, **kwargs)
                if self.norm is not None and isinstance(outputs, dict):
                    outputs["grad_norm"] = self.norm
                return outputs
            except (UserError, torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                images = self._images(runner, self.step)
                try:
                    found = self._find(runner, self.step)
                except RuntimeError:  # a GPU that has failed cannot run anything again
                    found = []
                if not found:
                    print_log(f"the training step failed on images {', '.join(images)}", "current", logging.ERROR)
                    raise
                reason = f"{type(error).__name__} ({' '.join(str(error).split())[:80]})"
                text = f"the training step failed with {reason}"
                raise UserError(self._line(self.step, text, images, found)) from error

        return step

    def at_once(self, runner: Runner, batch_idx: int) -> bool:
        return self.patience > 1 or super().at_once(runner, batch_idx)

    def send(self, runner: Runner, outputs: dict | None) -> Step:
        """Loss and norm, of which all processes are to know whether they are finite."""
        loss = torch.as_tensor((outputs or {}).get("loss", 0.0)).detach().float()
        updating = runner.optim_wrapper.should_update()
        norm = self.norm if self.norm is not None else torch.full_like(loss, math.inf if updating else 0.0)
        numbers = torch.stack([loss.to(norm.device), norm.float()])
        anywhere = (~numbers.isfinite()).float()
        all_reduce(anywhere)
        if self.patience == 1:  # then nothing is updated until the host knows
            self.stopping = self.stopping | (anywhere[0] if self.scaler else anywhere.amax()).bool()
        return self.step._replace(updating=updating, numbers=ToHost(torch.cat([numbers, anywhere])))

    def read(self, runner: Runner, sent: Step) -> None:
        """Count non-finite steps, and stop the run at the limit.

        Raises:
            UserError: the limit is reached.
        """
        loss, norm, lost, skipped = sent.numbers.read().tolist()
        if not (lost or skipped):
            # A step that only accumulates gradients does not test the loss scale.
            self.failed, self.skipped = 0, 0 if sent.updating else self.skipped
            return
        if lost or self.scaler is None:
            self.failed += 1
            text = f"loss is {loss}" if lost else f"gradient norm is {norm}"
            level, enough = logging.WARNING, self.failed >= self.patience
        else:
            self.skipped += 1
            scale = f"the loss scale is now {self.scaler.get_scale():g}"
            text = f"scaled gradient is not finite {self.skipped} times in a row; {scale}"
            level, enough = logging.INFO, self.skipped >= self.max_skipped_steps
        if enough:
            self._stop(runner, sent, text, its_own=lost and not math.isfinite(loss))
        print_log(f"{text} on images {', '.join(self._images(runner, sent))}: weights not updated", "current", level)
        for buffer, before in zip(runner.model.buffers(), self.buffers, strict=bool(self.buffers)):
            buffer.copy_(before)

    def _stop(self, runner: Runner, step: Step, text: str, its_own: bool) -> NoReturn:
        """Raise the error, the same in all processes."""
        images, found = self._images(runner, step), self._find(runner, step)
        reports = all_gather_object((its_own, text, images, found))
        # Report the process whose own numbers are bad, by its loss or by what running the step again found.
        rank, (_, text, images, found) = min(
            enumerate(reports), key=lambda item: (not item[1][0], not item[1][3], item[0])
        )
        process = f" in process {rank}" if len(reports) > 1 else ""
        raise UserError(self._line(step, text + process, images, found, log=rank == get_rank()))

    def _find(self, runner: Runner, step: Step) -> list[str]:
        """Run the step again, with the same random numbers."""
        set_random_state(step.random_state)
        model = bare(runner.model)
        context = runner.optim_wrapper.optim_context(model)
        return first_non_finite(model, step.batch, context, self.scaler.get_scale() if self.scaler else 1.0)

    def _line(self, step: Step, text: str, images: Sequence[str], found: Sequence[str], log: bool = True) -> str:
        """The error message; its details are logged."""
        where = f"at epoch {step.epoch + 1}, iteration {step.iter + 1}"
        first = found[0] if found else "nothing when the step was run again"
        if log:
            details = "".join(f"\n  {line}" for line in found)
            print_log(f"{text} {where}\nimages: {', '.join(images)}\nnot finite:{details}", "current", logging.ERROR)
        more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
        return f"{text} {where}, on images {', '.join(images[:SHOWN])}{more}; first non-finite: {first}"

    def _images(self, runner: Runner, step: Step) -> list[str]:
        """Ids and paths of the batch's images, or their places in the data set."""
        samples = step.batch.get("data_samples") if isinstance(step.batch, dict) else None
        if isinstance(samples, list) and all(hasattr(sample, "img_path") for sample in samples):
            ids = [sample.get("img_id") for sample in samples]
            paths = [sample.img_path for sample in samples]
            return [path if i is None else f"{i} ({path})" for i, path in zip(ids, paths, strict=True)]
        loader = runner.train_dataloader
        batches = getattr(loader.batch_sampler, "batches", loader.batch_sampler)  # inside ResumableBatches
        if type(batches) is not BatchSampler or not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return [f"of batch {step.batch_idx}"]
        # mmengine's sampler gives the same order again within an epoch.
        indices = next(islice(batches, step.batch_idx, None), [])
        name = getattr(loader.dataset, "image_name", lambda index: f"at place {index}")
        return [name(index) for index in indices]
