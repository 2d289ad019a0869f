"""Checkpoints from which a run resumes bit for bit, that a fault leaves whole, and that SIGTERM asks for."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmdet_lors.engine.processes.stop import Stopped, StopRequest
from mmdet_lors.engine.random_state import random_state, set_random_state
from mmdet_lors.engine.resume.state import exact_state, set_exact_state
from mmdet_lors.errors import UserError

from .whole_files import WholeFileBackend, remove_unfinished, with_checksums, write_whole

STOPPED = "stopped.pth"
"""Name of the checkpoint that SIGTERM asks for; the next regular one replaces it."""


class _Validation(NamedTuple):
    """A validation that training waits for."""

    random_state: dict
    """Training goes on with it, whatever validation draws."""
    common_batches: int
    """Batches that every process has."""


def _not_of_file_client(record: logging.LogRecord) -> bool:
    """False for the announcements that mmengine's checkpoints cause in every run, by classes that it will remove."""
    return not str(record.msg).startswith(('"FileClient" will be', '"HardDiskBackend" is the alias'))


@HOOKS.register_module()
class ReliableCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, with its arguments and file names, for runs that are interrupted.

    - A checkpoint is written whole or not at all (:mod:`.whole_files`), with a checksum for each tensor; what it
      replaces is removed afterwards.
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
        self._batch = 0
        self._saved_iter = -1
        self._validation: _Validation | None = None

    def before_train(self, runner: Runner) -> None:
        """Clean up after a killed run, listen for SIGTERM, and take up the checkpoint that was loaded, if any."""
        if self.file_client_args is None:
            runner.logger.addFilter(_not_of_file_client)
        super().before_train(runner)
        if is_main_process() and self._writes_whole_files:
            remove_unfinished(Path(self.out_dir))
        self._stop.listen()
        loaded, self._loaded = self._loaded, None
        if runner.iter > 0 and loaded and loaded["iter"] == runner.iter:
            self._resume(runner, loaded)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what a resumed run will need."""
        self._loaded = checkpoint.get("exact_resume")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put it in its place, in a checkpoint that can be resumed; the best one cannot."""
        if (state := checkpoint["meta"].pop("exact_resume", None)) is not None:
            replaced = self.file_backend.postponed or [] if self._writes_whole_files else []
            checkpoint["exact_resume"] = dict(state, replaces=[path.name for path in replaced])

    def _resume(self, runner: Runner, saved: dict) -> None:
        if is_main_process():  # A run killed right after it saved has not removed these.
            for name in saved["replaces"]:
                Path(self.out_dir, Path(name).name).with_suffix(".pth").unlink(missing_ok=True)
        if (last := runner.message_hub.runtime_info.get("last_ckpt")) is not None:
            # Its name ends the path as another system may have written it, with / or \\.
            self.last_ckpt = os.path.join(self.out_dir, PureWindowsPath(last).name)
        self._saved_iter = runner.iter
        batch, random_numbers = set_exact_state(runner, saved)
        if not hasattr(runner.train_loop, "go_on"):
            return
        if not saved["validated"] and runner.train_loop.validation_is_due(batch):
            runner.logger.info(f"Validating what was trained until iteration {runner.iter}, before training goes on")
            runner.val_loop.run()
        self._batch = batch
        runner.train_loop.go_on(batch, random_numbers)

    @property
    def _writes_whole_files(self) -> bool:
        return isinstance(self.file_backend, WholeFileBackend)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        with with_checksums(), self.file_backend.removing_last() if self._writes_whole_files else nullcontext():
            yield

    def _with_state(self, runner: Runner, meta: dict) -> dict:
        """``meta``, with what :meth:`before_save_checkpoint` takes out again; called by all processes."""
        runner.call_hook("before_checkpoint")  # ReadLateHook's
        before_validation = self._validation and self._validation.random_state
        return dict(meta, exact_resume=exact_state(runner, meta, self._batch, before_validation))

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        try:
            with self._saving():
                super()._save_checkpoint_with_step(runner, step, self._with_state(runner, meta))
        except OSError as error:
            raise UserError(f"{runner.work_dir}/last_checkpoint cannot be written: {error.strerror}") from error
        self._saved_iter = meta["iter"]
        if is_main_process() and self._writes_whole_files:
            Path(self.out_dir, STOPPED).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        with self._saving():
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
        """Note where training waits."""
        if self._stop.listening:
            self._validation = _Validation(random_state(), -self._stop.largest(-len(runner.val_dataloader)))

    def after_val_iter(self, runner: Runner, batch_idx: int, **_: Any) -> None:
        """Stop if a process was told to, and nothing is lost: the validation will be made up for."""
        saved = self._validation and self._saved_iter == runner.iter
        if saved and batch_idx < self._validation.common_batches and self._stop.agreed():
            raise Stopped(self.last_ckpt)

    def after_val(self, runner: Runner) -> None:
        """Stop if a process was told to."""
        if not self._stop.listening:
            return
        if self._stop.agreed():
            self._save_and_stop(runner, dict(epoch=runner.epoch, iter=runner.iter))
        set_random_state(self._validation.random_state)
        self._validation = None

    def after_train(self, runner: Runner) -> None:
        """Publish, and leave SIGTERM alone."""
        super().after_train(runner)
        self._stop.ignore()

    def _save_and_stop(self, runner: Runner, meta: dict) -> None:
        if self._saved_iter != meta["iter"]:
            with self._saving():
                runner.save_checkpoint(
                    self.out_dir,
                    STOPPED,
                    file_client_args=self.file_client_args,
                    meta=self._with_state(runner, meta),
                    by_epoch=False,
                    backend_args=self.backend_args,
                )
            self.last_ckpt = os.path.join(self.out_dir, STOPPED)
            if is_main_process():
                write_whole(Path(runner.work_dir, "last_checkpoint"), self.last_ckpt.encode())
        raise Stopped(self.last_ckpt)
