"""What a checkpoint has beside mmengine's content, for a run to resume bit for bit: its ``exact_resume``."""

import zlib
from typing import Any

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_rank, get_world_size
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdet_lors.engine.build import bare
from mmdet_lors.engine.random_state import random_state, set_random_state
from mmdet_lors.engine.zero import collect_state


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that differ from the first process's, such as BatchNorm's running statistics; called by all processes."""
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}
    sums = {name: zlib.crc32(buffer.reshape(-1).view(torch.uint8).numpy()) for name, buffer in buffers.items()}
    first = [sums]
    broadcast_object_list(first)
    return {name: buffer.clone() for name, buffer in buffers.items() if sums[name] != first[0].get(name)}


def _batch_size(runner: Runner) -> int:
    return getattr(runner.train_dataloader.batch_sampler, "batch_size", 1)


def exact_state(runner: Runner, meta: dict, batch: int, before_validation: dict | None) -> dict[str, Any]:
    """The content of ``exact_resume``; called by all processes.

    Args:
        runner: between two iterations.
        meta: the checkpoint's, with ``epoch`` and ``iter``.
        batch: batches of this epoch that are done.
        before_validation: the random state when a validation began that is now done; None if there is none.
    """
    collect_state(getattr(runner.optim_wrapper, "optimizer", None))
    mine = dict(random_state=before_validation or random_state(), buffers=_own_buffers(bare(runner.model)))
    return dict(
        epoch=meta["epoch"],
        iter=meta["iter"],
        batch=batch,
        validated=before_validation is not None,
        world_size=get_world_size(),
        batch_size=_batch_size(runner),
        processes=all_gather_object(mine),
    )


def set_exact_state(runner: Runner, saved: dict[str, Any]) -> tuple[int, dict | None]:
    """Set this process's random state and buffers from :func:`exact_state`.

    Returns:
        Batches of this epoch that are done, and the random state; None for a process that the saved run did not have.
    """
    batch = saved["batch"]
    if (now := (get_world_size(), _batch_size(runner))) != (before := (saved["world_size"], saved["batch_size"])):
        runner.logger.warning(
            f"The checkpoint is of {before[0]} processes x {before[1]} samples, this run of {now[0]} x {now[1]}: "
            "it resumes from the same weights and sample, but not bit for bit."
        )
        batch = batch * before[0] * before[1] // (now[0] * now[1])
    if get_rank() >= len(saved["processes"]):
        return batch, None
    mine = saved["processes"][get_rank()]
    set_random_state(mine["random_state"])
    for name, value in mine["buffers"].items():
        bare(runner.model).get_buffer(name).copy_(value)
    return batch, mine["random_state"]
