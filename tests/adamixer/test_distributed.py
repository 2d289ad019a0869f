"""Two processes at batch b against one at 2b, on the CPU over gloo, without find_unused_parameters."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from conftest import LORS_DIGITS, PLAIN_DIGITS, data_samples, load_config
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.model import MMDistributedDataParallel

NUM_BOXES = [3, 0, 1, 5]
"""Different numbers of positives on each rank, and an image without any object."""


def batch():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(len(NUM_BOXES), 3, 96, 96, generator=generator, dtype=torch.float64)
    torch.manual_seed(4)
    return images, data_samples(NUM_BOXES, (96, 96), 10)


def build(name: str):
    """In eval mode, for batch norm's statistics are those of a process, not of the whole batch."""
    cfg = load_config(name)
    torch.manual_seed(5)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.double().eval()


def loss(losses: dict) -> torch.Tensor:
    return sum(v for k, v in losses.items() if "loss" in k)


def worker(rank: int, name: str, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=True)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = MMDistributedDataParallel(build(name), broadcast_buffers=False, find_unused_parameters=False)
    images, samples = batch()
    half = slice(2 * rank, 2 * rank + 2)
    # A second step would raise if a parameter had not taken part in the first.
    for _ in range(2):
        model.zero_grad()
        loss(model(images[half], samples[half], mode="loss")).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.module.named_parameters()}, out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS])
def test_two_processes_equal_one_at_the_same_global_batch(name, tmp_path):
    """Gradients agree within 1e-9 of their norm, in float64."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = tmp_path / "grads.pt"
    mp.spawn(worker, args=(name, port, str(out)), nprocs=2)
    model = build(name)
    images, samples = batch()
    loss(model.loss(images, samples)).backward()
    theirs = torch.load(out)
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        difference = (parameter.grad - theirs[key]).norm()
        assert difference <= 1e-9 * parameter.grad.norm() + 1e-15, key
