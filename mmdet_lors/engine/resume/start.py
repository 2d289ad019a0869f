"""Which checkpoint a run starts from, the same in all its processes, and how to resume a run that stopped."""

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, init_dist, is_distributed
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.utils.dl_utils import set_multi_processing

from mmdet_lors.engine.checkpoint.hook import STOPPED
from mmdet_lors.engine.checkpoint.reading import Damaged, read_checkpoint
from mmdet_lors.engine.checkpoint.whole_files import saved_at
from mmdet_lors.engine.launch import is_first_process
from mmdet_lors.engine.processes.restarts import restarted_store, restarts
from mmdet_lors.errors import UserError, first_line

RESUMABLE = {EpochBasedTrainLoop: "ResumableEpochLoop", IterBasedTrainLoop: "ResumableIterLoop"}


def make_resumable(cfg: Config) -> None:
    """Give a config the loops and data workers that a run needs to be interrupted anywhere."""
    loop = cfg.train_cfg
    if not isinstance(loop, dict):
        return
    if "by_epoch" in loop:
        loop.type = "EpochBasedTrainLoop" if loop.pop("by_epoch") else "IterBasedTrainLoop"
    with LOOPS.switch_scope_and_registry(None) as registry:
        kind = registry.get(loop.type) if isinstance(loop.type, str) else loop.type
    loop.type = RESUMABLE.get(kind, loop.type)
    for name in ("train_dataloader", "val_dataloader"):
        loader = cfg.get(name)
        if loader and "disable_subprocess_warning" not in loader:
            loader.setdefault("worker_init_fn", dict(type="outlive_sigterm"))


class Start(NamedTuple):
    """What a run starts from: a file or address, what was read from the file, and whether more than weights is used."""

    path: str | None
    checkpoint: dict | None
    resume: bool


def newest_whole_checkpoint(cfg: Config) -> tuple[str, dict] | None:
    """The newest checkpoint of the config's work folder that is whole, and its content; None where there is none.

    Damaged ones are skipped, with a line that says why; the best checkpoints have no optimizer and do not count.

    Raises:
        UserError: there are checkpoints, but all are damaged; or the newest whole one is not safe to load.
    """
    hook = cfg.default_hooks.get("checkpoint") or {}
    folder = Path(cfg.work_dir)
    if hook.get("out_dir"):
        folder = Path(hook["out_dir"], folder.name)
    template = hook.get("filename_tmpl") or "*_{}.pth"
    found = {*folder.glob(template.format("*")), *folder.glob(STOPPED)}
    found = {path for path in found if path.is_file() and not path.name.startswith("best_")}
    for path in sorted(found, key=saved_at, reverse=True):
        try:
            return str(path), read_checkpoint(path)
        except Damaged as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
    if found:
        raise UserError(
            f"--resume finds no checkpoint that is whole in {folder}: all {len(found)} are damaged, as said above; "
            "remove them to start from the beginning"
        )
    return None


def choose_start(cfg: Config, given: str | None) -> Start:
    """Read what the run starts from, once in each process, the same in all; set it in the config.

    Args:
        cfg: its ``resume``, ``load_from`` and ``randomness`` are set.
        given: path of a checkpoint to resume from, "auto" for the newest, or None for what the config says. A run that
            torchrun has started again always resumes from the newest, if there is one.

    Raises:
        UserError: as :func:`newest_whole_checkpoint` and
            :func:`~mmdet_lors.engine.checkpoint.reading.read_checkpoint`.
    """
    if given:
        cfg.resume, cfg.load_from = True, None if given == "auto" else given
    path, checkpoint, resume = cfg.get("load_from"), None, bool(cfg.get("resume"))
    if resume or restarts():
        if cfg.launcher != "none" and not is_distributed():
            set_multi_processing(**cfg.env_cfg.get("mp_cfg", {}), distributed=True)
            init_dist(cfg.launcher, **{**cfg.env_cfg.get("dist_cfg", {}), **restarted_store()})
        if is_first_process() and (restarts() or not path):
            if newest := newest_whole_checkpoint(cfg):
                (path, checkpoint), resume = newest, True
            resume = resume and bool(path)
        answer = [(path, resume)]
        broadcast_object_list(answer)
        path, resume = answer[0]
        if is_first_process() and not path:
            print(f"no checkpoint in {cfg.work_dir} yet: the run starts from the beginning", flush=True)
    if is_first_process() and resume:
        print(f"resuming from {path}", flush=True)
    if path and checkpoint is None and "://" not in path:
        checkpoint = read_checkpoint(path)
    cfg.load_from, cfg.resume = path, resume
    if resume and checkpoint and (seed := checkpoint.get("meta", {}).get("seed")) is not None:
        # Before anything is built: the sampler's order and what is augmented depend on it.
        cfg.randomness = dict(cfg.get("randomness") or {}, seed=seed)
    return Start(path, checkpoint, resume)


def how_to_go_on(args: argparse.Namespace, argv: list[str]) -> str:
    """The command that resumes this run.

    Args:
        args: the parsed command line, of which ``config`` and ``launcher`` are read.
        argv: the command line.
    """
    words, rest = argv[1:], []
    words.remove(args.config)
    while words:
        word = words.pop(0)
        if word in ("--resume", "--launcher", "--local-rank", "--local_rank"):
            if words and not words[0].startswith("-"):
                words.pop(0)
        elif word.split("=")[0] not in ("--resume", "--launcher", "--local-rank", "--local_rank"):
            rest.append(word)
    if args.launcher == "pytorch":
        command = ["bash", "tools/dist_train.sh", args.config, os.environ.get("LOCAL_WORLD_SIZE", "1")]
    elif args.launcher == "none":
        command = ["python", "tools/train.py", args.config]
    else:
        return "the same command with --resume"
    return shlex.join([*command, *rest, "--resume"])


@contextmanager
def faults_in_one_line(then: str = "--resume resumes from the newest checkpoint") -> Iterator[None]:
    """Errors of other processes and of the disk, as one line.

    Args:
        then: what to do after another process has ended.

    Raises:
        UserError: the connection to another process broke, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{error.filename or 'a file'} cannot be written: {error.strerror}") from error
    except RuntimeError as error:
        text = str(error)
        if not any(sign in text for sign in ("onnection closed", "onnection reset", "roken pipe", "NCCL")):
            raise
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "?"))
        raise UserError(
            f"process {rank} lost the connection to another process, which ended or was killed: "
            f"{first_line(error)}; {then}"
        ) from error
