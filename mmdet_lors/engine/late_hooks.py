"""Hooks read what a training step computed when the next one is under way: the host does not wait for the device."""

from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook, LoggerHook, RuntimeInfoHook
from mmengine.runner import Runner
from torch import Tensor

from mmdet_lors.transfer import ToHost


class ReadLateHook(Hook):
    """Calls :meth:`send` after every training step, and :meth:`read` after the next step with what it returned.

    Or at once: where a line is logged, at the end of an epoch, before a validation and a checkpoint
    (``ReliableCheckpointHook``), and at the end of training.
    """

    unread: Any = None

    def send(self, runner: Runner, outputs: dict | None) -> Any:
        """What :meth:`read` will need of this step; None for nothing."""
        raise NotImplementedError

    def read(self, runner: Runner, sent: Any) -> None:
        """Use it."""
        raise NotImplementedError

    def at_once(self, runner: Runner, batch_idx: int) -> bool:
        """Whether this step is read before the next."""
        loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)]
        logged = any(hook.every_n_inner_iters(batch_idx, hook.interval) for hook in loggers)
        return logged or self.end_of_epoch(runner.train_dataloader, batch_idx)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Send this step's, and read the last one's."""
        sent = self.send(runner, outputs)
        self.read_rest(runner)
        self.unread = sent
        if self.at_once(runner, batch_idx):
            self.read_rest(runner)

    def read_rest(self, runner: Runner) -> None:
        """Read what has been sent and not yet read."""
        sent, self.unread = self.unread, None
        if sent is not None:
            self.read(runner, sent)

    def before_checkpoint(self, runner: Runner) -> None:
        """Called by ``ReliableCheckpointHook``, in all processes."""
        self.read_rest(runner)

    def before_val(self, runner: Runner) -> None:
        self.read_rest(runner)
        super().before_val(runner)

    def after_train(self, runner: Runner) -> None:
        self.read_rest(runner)
        super().after_train(runner)


@HOOKS.register_module()
class LateRuntimeInfoHook(ReadLateHook, RuntimeInfoHook):
    """mmengine's ``RuntimeInfoHook``, which waits for the device at every number that a training step gives to log."""

    def send(self, runner: Runner, outputs: dict | None) -> tuple[dict, list[str], ToHost | None]:
        """All of them, those on the model's device in one transfer."""
        # Detached: the loss would keep what its graph holds until the next step is done.
        outputs = {name: v.detach() if isinstance(v, Tensor) else v for name, v in (outputs or {}).items()}
        places = [value.device for value in outputs.values() if isinstance(value, Tensor)]
        device = next((place for place in places if place.type != "cpu"), torch.device("cpu"))
        names = [name for name, value in outputs.items() if isinstance(value, Tensor) and value.device == device]
        return outputs, names, ToHost(torch.cat([outputs[name].reshape(1) for name in names])) if names else None

    def read(self, runner: Runner, sent: tuple[dict, list[str], ToHost | None]) -> None:
        """Hand them to the message hub, from which they are logged."""
        outputs, names, tensors = sent
        if tensors is not None:
            outputs |= zip(names, tensors.read().tolist(), strict=True)
        for name, value in outputs.items():
            runner.message_hub.update_scalar(f"train/{name}", value)
