"""Gradients of a model, in one process and in two."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp
from conftest import free_port
from torch import Tensor, nn


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _worker(rank: int, port: int, out: Path, make: Callable[[], nn.Module], x: Tensor) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(make())
    # A second step would raise if a parameter had not taken part in the first.
    for _ in range(2):
        found = gradients(model, x[rank : rank + 1])
    if rank == 0:
        torch.save({name.removeprefix("module."): g for name, g in found.items()}, out)
    torch.distributed.destroy_process_group()


def assert_two_processes_have_those_of_one(make: Callable[[], nn.Module], x: Tensor, folder: Path) -> None:
    """``make``: the same model, in float64, in every process; x holds one input for each of two."""
    mp.spawn(_worker, (free_port(), folder / "gradients.pt", make, x), nprocs=2)
    found, expected = torch.load(folder / "gradients.pt"), gradients(make(), x)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert relative(2 * gradient, expected[name]) < 1e-10, name
