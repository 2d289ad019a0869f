"""What is served folded is never older than the weights, however these change, and changes nothing else."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmdet_lors.lors import LORSA, LORST

KINDS = {
    "LORST": lambda: LORST(6, 5, num_layers=3, rank=2, groups=[0, 2, 3]),
    "LORSA": lambda: LORSA(6, [(4, 4), (3, 5)], 2, num_layers=3, rank=2, groups=[1, 0, 2]),
    "private only": lambda: LORSA(6, [(4, 4)], 2, num_layers=3, rank=2, shared=False),
}


def build(kind: str) -> nn.Module:
    module = KINDS[kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double().eval()


def served(kind: str) -> nn.Module:
    """One that has served already."""
    module = build(kind).serve()
    outputs(module)
    return module


@torch.no_grad()
def outputs(module: nn.Module) -> list[Tensor]:
    torch.manual_seed(8)
    x = torch.randn(4, 6, dtype=torch.float64)
    x = x.to(next(module.parameters()).dtype)
    found = [module(x, i) for i in range(3)]
    return [w for layer in found for w in (layer if isinstance(layer, list) else [layer])]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-11) -> bool:
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(ours, theirs, strict=True))


def unserved(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).serve(False)


def last(module: nn.Module) -> nn.Parameter:
    """A parameter of a layer's own."""
    return module.private[2].B[0] if isinstance(module, LORSA) else module.private[2].B


def shared(module: nn.Module) -> nn.Parameter:
    """The one that all layers share, if they do."""
    return next(module.parameters())


def each(write: Callable[[nn.Parameter], object]) -> Callable[[nn.Module], None]:
    @torch.no_grad()
    def change(module: nn.Module) -> None:
        for parameter in module.parameters():
            write(parameter)

    return change


def one(which: Callable[[nn.Module], nn.Parameter], write: Callable[[nn.Parameter], object]):
    @torch.no_grad()
    def change(module: nn.Module) -> None:
        write(which(module))

    return change


def swap(module: nn.Module) -> None:
    """As mmengine's EMAHook does."""
    average = [p.data.clone().mul_(0.5) for p in module.parameters()]
    for p, a in zip(module.parameters(), average, strict=True):
        kept = p.data.clone()
        p.data.copy_(a.data)
        a.data.copy_(kept)


def optimizer_step(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


@torch.no_grad()
def replaced(module: nn.Module) -> None:
    if isinstance(module, LORST):
        module.shared = nn.Parameter(torch.ones_like(module.shared))
    else:
        module.private[0].B[0] = nn.Parameter(torch.ones_like(module.private[0].B[0]))


def last_bit(p: nn.Parameter) -> None:
    p.flatten()[:1].view(torch.int64).bitwise_xor_(1)


def numpy_view(p: nn.Parameter) -> None:
    p.detach().numpy()[...] *= 0.5


CHANGES = {
    "copy_": each(lambda p: p.copy_(torch.randn_like(p))),
    "add_": each(lambda p: p.add_(0.1)),
    "add_ to one": one(last, lambda p: p.add_(0.1)),
    "one entry": one(shared, lambda p: p[0].mul_(1.5)),
    "the last bit of one entry": one(shared, last_bit),
    "a view's write": one(last, lambda p: p.view(-1)[-1:].zero_()),
    "detach()": one(last, lambda p: p.detach().neg_()),
    "init": one(last, nn.init.zeros_),
    "data.copy_": each(lambda p: p.data.copy_(torch.randn_like(p))),
    "data of one entry": one(shared, lambda p: p.data.view(-1)[:1].add_(1e-4)),
    "data, negated": one(last, lambda p: p.data.neg_()),
    "data, permuted": one(last, lambda p: p.data.copy_(p.data.flip(-1))),
    "data, rows permuted": one(shared, lambda p: p.data.copy_(p.data.flip(0))),
    "data = ": one(last, lambda p: setattr(p, "data", torch.randn_like(p))),
    "EMA": swap,
    "optimizer": optimizer_step,
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in m.parameters()), dtype=torch.float64), m.parameters()
    ),
    "NumPy": one(last, numpy_view),
    "another parameter": replaced,
    "load_state_dict": lambda m: m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}),
    "load_state_dict, assigned": lambda m: m.load_state_dict(
        {k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True
    ),
    "state_dict's tensors": lambda m: [v.mul_(2) for v in m.state_dict().values()],
    "float": lambda m: m.float(),
    "inference_mode": torch.inference_mode()(each(lambda p: p.mul_(2))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_follows(kind, change):
    module = served(kind)
    before = module.folded
    CHANGES[change](module)
    assert module.folded is not before
    assert close(outputs(module), outputs(unserved(module)), 1e-5 if change == "float" else 1e-11)
    assert module.folded is module.folded


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_follows_in_the_middle_of_a_pass(layer):
    module, x = served("LORST"), torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        module(x, 0)
        module.shared.data.add_(1)
        assert torch.allclose(module(x, layer), nn.functional.linear(x, *module.fold(layer)))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_and_leaves_the_weights_alone(kind):
    module = build(kind)
    before, expected = copy.deepcopy(module.state_dict()), outputs(module)
    module.serve()
    assert close(outputs(module), expected)
    assert module.train().folded is None
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_serves_its_own_weights(kind, how):
    module = served(kind)
    expected, copied = outputs(module), how(module)
    assert close(outputs(copied), expected, 0)
    with torch.no_grad():
        shared(copied).add_(1)
    assert close(outputs(copied), outputs(unserved(copied))) and close(outputs(module), expected, 0)
    assert not close(outputs(copied), expected, 0.01)


def test_is_in_no_file():
    plain, module = build("LORST"), served("LORST")
    sizes = []
    for m in (plain, module):
        torch.save(m, file := io.BytesIO())
        sizes.append(file.tell())
    assert abs(sizes[0] - sizes[1]) < 100


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_parameters_are_there_when_they_are_wanted(kind):
    """Fine-tuning in evaluation mode; frozen, it serves folded, and the input has its gradient."""
    x, module, plain = torch.randn(4, 6, dtype=torch.float64), served(kind), build(kind)
    plain.load_state_dict(module.state_dict())
    found = []
    for m in (module, plain):
        m.zero_grad()
        q = x.clone().requires_grad_()
        out = m(q, 2)
        sum(w.square().sum() for w in (out if isinstance(out, list) else [out])).backward()
        found.append([q.grad, *(p.grad for p in m.parameters() if p.grad is not None)])
    assert len(found[0]) > 3 and close(*found)
    module.requires_grad_(False)
    q = x.clone().requires_grad_()
    out = module(q, 2)
    sum(w.square().sum() for w in (out if isinstance(out, list) else [out])).backward()
    assert torch.allclose(q.grad, found[0][0])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_whoever_folds_first_leaves_the_same(mode):
    """In float64, and no inference tensors: both outlive the caller's mode."""
    module = build("LORSA").requires_grad_(False).serve()
    with mode():
        folded = module.folded
    weight = folded[2][0][0]
    assert weight.dtype == torch.float64 and not weight.is_inference() and not weight.requires_grad
    assert close(outputs(module), outputs(unserved(module)))


def test_a_module_made_in_inference_mode():
    with torch.inference_mode():
        module = build("LORST").serve()
        x = torch.randn(4, 6, dtype=torch.float64)
        module(x, 1)
        module.shared.add_(1)
        assert torch.allclose(module(x, 1), nn.functional.linear(x, *module.fold(1)))


class Both(nn.Module):
    def __init__(self, half: nn.Module) -> None:
        super().__init__()
        self.inner = half

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, 1).tanh() + self.inner(x, 2)[..., :5]


@torch.no_grad()
@pytest.mark.parametrize("how", ["compile", "export", "trace", "functional_call"])
def test_what_is_traced_reads_the_parameters(how):
    module, x = Both(served("LORST")).eval(), torch.randn(4, 6, dtype=torch.float64)
    expected = module(x)
    if how == "compile":
        run = torch.compile(module, backend="aot_eager", fullgraph=True)
    elif how == "export":
        exported = torch.export.export(module, (x,))
        assert exported.state_dict.keys() == module.state_dict().keys()
        assert torch.allclose(exported.module()(x), expected)
        return
    elif how == "trace":
        run = torch.jit.trace(module, x)
    else:
        values = {k: v * 2 for k, v in module.state_dict().items()}
        found = torch.func.functional_call(module, values, x)
        module.load_state_dict(values)
        assert torch.allclose(found, module(x)) and not torch.allclose(found, expected)
        return
    assert torch.allclose(run(x), expected)
    module.inner.shared.data.add_(1)
    assert torch.allclose(run(x), module(x)) and not torch.allclose(run(x), expected)


def test_on_the_meta_device():
    module = served("LORST").to("meta")
    with torch.no_grad():
        assert module(torch.empty(4, 6, dtype=torch.float64, device="meta"), 1).shape == (4, 5)
