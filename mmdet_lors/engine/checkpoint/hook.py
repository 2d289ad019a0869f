"""Checkpoints that a run goes on from bit for bit, that a fault leaves whole, and that SIGTERM asks for."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, broadcast_object_list, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdet_lors.engine.processes.stop import Stopped, StopRequest
from mmdet_lors.engine.random_state import random_state, set_random_state
from mmdet_lors.engine.zero import collect_state
from mmdet_lors.errors import UserError

from .seal import WholeFileBackend, remove_unfinished, write_whole

STOPPED = "stopped.pth"
"""Name of the checkpoint that SIGTERM asks for; the next regular one replaces it."""


def _bare(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that differ from the first process's, such as BatchNorm's running statistics; called by all processes."""
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}
    sums = {name: zlib.crc32(buffer.reshape(-1).view(torch.uint8).numpy()) for name, buffer in buffers.items()}
    first = [sums]
    broadcast_object_list(first)
    return {name: buffer.clone() for name, buffer in buffers.items() if sums[name] != first[0].get(name)}


@HOOKS.register_module()
class ReliableCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, with its arguments and file names, for runs that are interrupted.

    - A checkpoint is written whole or not at all and carries its checksum (:mod:`.seal`); what it replaces is removed
      afterwards.
    - Beside mmengine's content it has ``exact_resume``: the position within the epoch, whether its validation is done,
      and every process's random state and own buffers. A run that resumes from it does what it would have done
      uninterrupted; with ``ResumableEpochLoop`` or ``ResumableIterLoop`` also from the middle of an epoch.
    - After SIGTERM to any process all finish the same iteration, ``stopped.pth`` is written, and they end with
      :class:`Stopped`. A validation is cut short where the epoch's checkpoint is written.

    Raises:
        UserError: a checkpoint cannot be written.
    """

    def __init__(
        self, *args: Any, backend_args: dict | None = None, file_client_args: dict | None = None, **settings: Any
    ) -> None:
        if backend_args is None and file_client_args is None and "://" not in str(settings.get("out_dir") or ""):
            backend_args = dict(backend="whole_file")
        super().__init__(*args, backend_args=backend_args, file_client_args=file_client_args, **settings)
        self._stop = StopRequest()
        self._loaded: dict | None = None
        self._to_save: dict | None = None
        self._batch = 0
        self._saved_iter = -1
        self._random_state: dict | None = None
        self._common_val_batches = 0

    def before_train(self, runner: Runner) -> None:
        """Clean up after a killed run, listen for SIGTERM, and go on from the checkpoint that was loaded, if any."""
        super().before_train(runner)
        if is_main_process() and self._writes_whole_files:
            remove_unfinished(Path(self.out_dir))
        self._stop.listen()
        if runner.iter > 0 and self._loaded and self._loaded["iter"] == runner.iter:
            self._go_on(runner, self._loaded)
        self._loaded = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what a resumed run will need."""
        self._loaded = checkpoint.get("exact_resume")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add it to a checkpoint that can be resumed; the best one cannot."""
        if self._to_save is not None:
            replaced = self.file_backend.postponed or [] if self._writes_whole_files else []
            checkpoint["exact_resume"] = dict(self._to_save, replaces=[path.name for path in replaced])

    def _go_on(self, runner: Runner, saved: dict) -> None:
        batches = getattr(runner.train_dataloader.batch_sampler, "batch_size", 1)
        batch = saved["batch"]
        if (now := (get_world_size(), batches)) != (before := (saved["world_size"], saved["batch_size"])):
            runner.logger.warning(
                f"The checkpoint is of {before[0]} processes x {before[1]} samples, this run of {now[0]} x {now[1]}: "
                "it goes on from the same weights and sample, but not bit for bit."
            )
            batch = batch * before[0] * before[1] // (now[0] * now[1])
        if is_main_process():  # A run killed right after it saved has not removed these.
            for name in saved["replaces"]:
                Path(self.out_dir, Path(name).name).with_suffix(".pth").unlink(missing_ok=True)
        mine = None
        if get_rank() < len(saved["processes"]):
            mine = saved["processes"][get_rank()]
            set_random_state(mine["random_state"])
            for name, value in mine["buffers"].items():
                _bare(runner.model).get_buffer(name).copy_(value)
        if (last := runner.message_hub.runtime_info.get("last_ckpt")) is not None:
            # Its name ends the path as another system may have written it, with / or \\.
            self.last_ckpt = os.path.join(self.out_dir, PureWindowsPath(last).name)
        self._saved_iter = runner.iter
        if not hasattr(runner.train_loop, "go_on"):
            return
        if not saved["validated"] and runner.train_loop.validation_is_due(batch):
            runner.logger.info(f"Validating what was trained until iteration {runner.iter}, before training goes on")
            runner.val_loop.run()
        self._batch = batch
        runner.train_loop.go_on(batch, mine and mine["random_state"])

    def _state(self, runner: Runner, meta: dict) -> dict:
        """What ``exact_resume`` holds; called by all processes."""
        collect_state(getattr(runner.optim_wrapper, "optimizer", None))
        mine = dict(
            random_state=self._random_state or random_state(),
            buffers=_own_buffers(_bare(runner.model)),
        )
        return dict(
            epoch=meta["epoch"],
            iter=meta["iter"],
            batch=self._batch,
            validated=self._random_state is not None,
            world_size=get_world_size(),
            batch_size=getattr(runner.train_dataloader.batch_sampler, "batch_size", 1),
            processes=all_gather_object(mine),
        )

    @property
    def _writes_whole_files(self) -> bool:
        return isinstance(self.file_backend, WholeFileBackend)

    @contextmanager
    def _removing_last(self) -> Iterator[None]:
        with self.file_backend.removing_last() if self._writes_whole_files else nullcontext():
            yield

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        self._to_save = self._state(runner, meta)
        try:
            with self._removing_last():
                super()._save_checkpoint_with_step(runner, step, meta)
        except OSError as error:
            raise UserError(f"{runner.work_dir}/last_checkpoint cannot be written: {error.strerror}") from error
        finally:
            self._to_save = None
        self._saved_iter = meta["iter"]
        if is_main_process() and self._writes_whole_files:
            Path(self.out_dir, STOPPED).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        with self._removing_last():
            super()._save_best_checkpoint(runner, metrics)

    def after_train_iter(self, runner: Runner, batch_idx: int, **rest: Any) -> None:
        """Save if it is time, and stop if a process was told to."""
        self._batch = batch_idx + 1
        super().after_train_iter(runner, batch_idx, **rest)
        # Between two updates of the weights, gradients have been summed up that no checkpoint holds.
        between = not getattr(runner.optim_wrapper, "should_update", lambda: True)()
        if self._stop.agreed() and not between:
            self._save_and_stop(runner, dict(epoch=runner.epoch, iter=runner.iter + 1))

    def after_train_epoch(self, runner: Runner) -> None:
        """Save if it is time."""
        self._batch = 0
        super().after_train_epoch(runner)

    def before_val(self, runner: Runner) -> None:
        """Training goes on with the random numbers that it has now, whatever validation draws."""
        if not self._stop.listening:
            return
        self._random_state = random_state()
        self._common_val_batches = -self._stop.largest(-len(runner.val_dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, **_: Any) -> None:
        """Stop if a process was told to, and nothing is lost: the validation will be made up for."""
        saved = self._stop.listening and self._saved_iter == runner.iter
        if saved and batch_idx < self._common_val_batches and self._stop.agreed():
            raise Stopped(self.last_ckpt)

    def after_val(self, runner: Runner) -> None:
        """Stop if a process was told to."""
        if not self._stop.listening:
            return
        if self._stop.agreed():
            self._save_and_stop(runner, dict(epoch=runner.epoch, iter=runner.iter))
        set_random_state(self._random_state)
        self._random_state = None

    def after_train(self, runner: Runner) -> None:
        """Publish, and leave SIGTERM alone."""
        super().after_train(runner)
        self._stop.ignore()

    def _save_and_stop(self, runner: Runner, meta: dict) -> None:
        if self._saved_iter != meta["iter"]:
            self._to_save = self._state(runner, meta)
            runner.save_checkpoint(
                self.out_dir,
                STOPPED,
                file_client_args=self.file_client_args,
                meta=meta,
                by_epoch=False,
                backend_args=self.backend_args,
            )
            self.last_ckpt = os.path.join(self.out_dir, STOPPED)
            if is_main_process():
                write_whole(Path(runner.work_dir, "last_checkpoint"), self.last_ckpt.encode())
        raise Stopped(self.last_ckpt)
