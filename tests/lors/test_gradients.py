"""LORSA's and LORST's gradients are those of plain products, whatever else asked for gradients before."""

import os
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_port
from disturbances import DISTURBANCES, gradients, largest_difference
from torch import Tensor, nn

from mmdet_lors.lors import LORSA, LORST

SHAPES, COPIES, GROUPS = [(4, 4), (6, 5)], 2, [1, 0, 2]
PATHS = {LORSA: ["weights", "fold"], LORST: ["features", "fold"]}
CASES = [(kind, path, shared) for kind in PATHS for path in PATHS[kind] for shared in (True, False)]


class Stack(nn.Module):
    """Three layers, each from what the one before gives; ``plain`` forms every weight by its equation."""

    def __init__(self, kind: type, path: str, shared: bool, plain: bool) -> None:
        super().__init__()
        groups = GROUPS if shared else [1, 1, 2]
        if kind is LORSA:
            lors = LORSA(8, SHAPES, COPIES, 3, rank=2, groups=groups, shared=shared, path=path)
        else:
            lors = LORST(8, 8, 3, rank=2, groups=groups, shared=shared, path=path)
        self.lors, self.plain = lors.double(), plain
        torch.manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def weight(self, i: int) -> Tensor:
        """LORST's equation 7."""
        weight, private = 0 if self.lors.shared is None else self.lors.shared, self.lors.private[i]
        return weight if private is None else weight + private.B @ private.A

    def weights(self, q: Tensor, i: int) -> list[Tensor]:
        """LORSA's equations 9 to 12, group by group."""
        sizes = [rows * cols for rows, cols in SHAPES]
        generated = [0, 0]
        if self.lors.shared is not None:
            flat = q @ self.lors.shared.weight.T + self.lors.shared.bias
            generated = [
                w.unflatten(-1, s)
                for w, s in zip(flat.unflatten(-1, (COPIES, -1)).split(sizes, -1), SHAPES, strict=True)
            ]
        private = self.lors.private[i]
        if private is None:
            return generated
        r, K = private.rank, private.groups
        E = (q @ private.E.weight.T + private.E.bias).unflatten(-1, (COPIES, K, 2, r, r))
        for k in range(K):
            for s, (B, A) in enumerate(zip(private.B, private.A, strict=True)):
                group = slice(k * r, (k + 1) * r)
                generated[s] = generated[s] + B[:, :, group] @ E[..., k, s, :, :] @ A[:, group]
        return generated

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            if isinstance(self.lors, LORSA):
                M, S = self.weights(x, i) if self.plain else self.lors(x, i)
                x = torch.tanh(x + M.flatten(-3)[..., :8] + (S @ S.mT).flatten(-3)[..., :8])
            elif self.plain:
                x = torch.tanh(x @ self.weight(i).T + self.lors.bias[i])
            else:
                x = torch.tanh(self.lors(x, i))
        return x

    def loss(self, x: Tensor, run: nn.Module | None = None) -> Tensor:
        return (self if run is None else run)(x).square().sum()

    def watched(self) -> list[Tensor]:
        """The shared weight first, and the last layer's own."""
        own = [p for p in self.lors.private[2].parameters() if p.dim() > 1]
        first = self.lors.shared.weight if isinstance(self.lors.shared, nn.Module) else self.lors.shared
        return own if first is None else [first, *own]


def inputs() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(2, 6, 8, dtype=torch.float64)


def after(disturb, kind: type, path: str, shared: bool, plain: bool) -> dict[str, Tensor]:
    stack = Stack(kind, path, shared, plain)
    return gradients(disturb, stack, stack.loss, inputs(), stack.watched())


@pytest.mark.parametrize("disturb", DISTURBANCES)
@pytest.mark.parametrize(("kind", "path", "shared"), CASES)
def test_gradients_are_those_of_plain_products(kind, path, shared, disturb):
    ours, theirs = (after(disturb, kind, path, shared, plain) for plain in (False, True))
    assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize(("kind", "path"), [(LORSA, "weights"), (LORSA, "fold"), (LORST, "features"), (LORST, "fold")])
def test_compiled(kind, path):
    """All but double backward, which torch.compile refuses, as it does retained graphs with its own defaults."""
    torch._dynamo.reset()
    stack = Stack(kind, path, True, False)
    loss = partial(stack.loss, run=torch.compile(stack, backend="aot_eager"))
    with torch._functorch.config.patch(donated_buffer=False):
        for disturb in DISTURBANCES:
            if disturb.__name__ != "gradient_penalty":
                found = gradients(disturb, stack, loss, inputs(), stack.watched())
                assert largest_difference(found, after(disturb, kind, path, True, True)) < 1e-12, disturb


def worker(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for kind, paths in PATHS.items():
        stack = Stack(kind, paths[0], True, False)
        parallel = nn.parallel.DistributedDataParallel(stack)
        for disturb in DISTURBANCES:
            if disturb.__name__ in ("nothing", "gradient_of_the_input", "gradient_of_parameters"):
                x = inputs()[rank : rank + 1]
                key = f"{kind.__name__} {disturb.__name__}"
                found[key] = gradients(disturb, stack, partial(stack.loss, run=parallel), x, stack.watched())
                del found[key]["x"]
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    """DDP averages: half of the gradient of the whole batch."""
    mp.spawn(worker, (free_port(), str(tmp_path / "gradients.pt")), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    assert len(found) == 6
    for key, ours in found.items():
        kind = {k.__name__: k for k in PATHS}[key.split()[0]]
        disturb = {d.__name__: d for d in DISTURBANCES}[key.split()[1]]
        expected = after(disturb, kind, PATHS[kind][0], True, True)
        del expected["x"]
        assert largest_difference({k: 2 * g for k, g in ours.items()}, expected) < 1e-12, key
