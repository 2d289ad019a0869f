"""LORSA against its equations, written out."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdet_lors.lors import LORSA, AdaptiveWeights, adaptive, recompute, static
from mmdet_lors.lors.recompute import small  # as it is: conftest puts another in its place

SHAPES = [(4, 4), (6, 5)]


def lorsa(**settings) -> LORSA:
    defaults = dict(query_dim=8, shapes=SHAPES, copies=2, num_layers=3, rank=[2, 3, 2], groups=[1, 2, 3])
    module = LORSA(**defaults | settings).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def written_out(module: LORSA, q: torch.Tensor, layer: int) -> list[torch.Tensor]:
    """One query, one copy, one group at a time."""
    private, out = module.private[layer], []
    flat = module.shared.weight @ q + module.shared.bias if module.shared is not None else None
    cores = private.E.weight @ q + private.E.bias
    r, K = private.rank, private.groups
    size = sum(rows * cols for rows, cols in SHAPES)
    for s, (rows, cols) in enumerate(SHAPES):
        begin = sum(i * j for i, j in SHAPES[:s])
        copies = []
        for g in range(2):
            weight = torch.zeros(rows, cols, dtype=q.dtype)
            if flat is not None:
                weight += flat[g * size + begin :][: rows * cols].view(rows, cols)
            for k in range(K):
                E = cores[(g * K + k) * 2 * r * r + s * r * r :][: r * r].view(r, r)
                B = private.B[s][g, :, k * r : (k + 1) * r]
                A = private.A[s][g, k * r : (k + 1) * r]
                weight += B @ E @ A
            copies.append(weight)
        out.append(torch.stack(copies))
    return out


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_weights_are_shared_plus_the_sum_of_b_e_a(shared, layer):
    module, q = lorsa(shared=shared), torch.randn(3, 5, 8, dtype=torch.float64)
    ours = module(q, layer)
    assert [tuple(w.shape) for w in ours] == [(3, 5, 2, 4, 4), (3, 5, 2, 6, 5)]
    for weight, expected in zip(ours, written_out(module, q[1, 2], layer), strict=True):
        assert torch.allclose(weight[1, 2], expected, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_folded_linear_generates_the_same_weights(shared, layer):
    module, q = lorsa(shared=shared), torch.randn(7, 8, dtype=torch.float64)
    plain = AdaptiveWeights(8, SHAPES, 2).double()
    with torch.no_grad():
        weight, bias = module.fold(layer)
        plain.weight.copy_(weight)
        plain.bias.copy_(bias)
    for ours, folded in zip(module(q, layer), plain(q), strict=True):
        assert torch.allclose(ours, folded, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_paths_agree_in_value_and_gradient(shared, layer):
    """ACM's and ASM's products with the weights, and the gradients of everything that goes in."""
    module = lorsa(shared=shared)
    q = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    found = {}
    for path in ("weights", "fold"):
        module.path = path
        M, S = module(q, layer)
        out = S @ (x @ M)
        module.zero_grad()
        q.grad = x.grad = None
        (out * out.detach().cos()).sum().backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found[path] = dict(gradients, out=out.detach(), q=q.grad, x=x.grad)
    assert len(found["weights"]) == (2 if shared else 0) + 6 + 3
    assert found["fold"].keys() == found["weights"].keys()
    for name, expected in found["weights"].items():
        assert (found["fold"][name] - expected).norm() <= 1e-10 * expected.norm(), name


def test_auto_takes_the_path_with_fewer_multiply_adds():
    """B E A costs as much for a query as for a column of the folded generator; there are m + 1 columns."""
    module = LORSA(8, SHAPES, 2, num_layers=2, rank=2)
    assert [module.chosen_path(n) for n in (1, 9, 10, 5000)] == ["weights", "weights", "fold", "fold"]
    assert LORSA(8, SHAPES, 2, num_layers=2, path="weights").chosen_path(5000) == "weights"


def test_fold_keeps_neither_the_folded_generator_nor_split_weights():
    """For the backward pass: the query and views of the parameters, nothing as large as the generator."""
    module, q = lorsa(path="fold"), torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weights = module(q, 2)
    own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), q]}
    assert all(t.untyped_storage().data_ptr() in own for t in kept if t.numel())
    assert all(w.is_contiguous() for w in weights)


@pytest.mark.parametrize(("size", "times"), [(8, 2), (7, 1)])
def test_what_is_small_is_kept_and_what_is_large_computed_again(size, times, monkeypatch):
    monkeypatch.setattr(recompute, "small", {torch.device("cpu"): 8}.get)
    x, calls = torch.ones(2, requires_grad=True), []
    out = recompute.recompute(lambda x: calls.append(x) or x.exp().exp(), x, instead_of=size)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert len(calls) == times and torch.allclose(gradient, (x + x.exp()).exp())


def test_of_the_papers_mixing_at_batch_2_with_300_queries_only_a_cpu_keeps_the_acm_and_nothing_the_asm():
    batch, queries, groups, in_points, out_points, channels = 2, 300, 2, 64, 128, 128
    acm, asm = (batch * queries * groups * points * channels for points in (in_points, out_points))
    assert small(torch.device("cuda")) < acm < small(torch.device("cpu")) < asm


def test_a_layer_without_groups_is_the_shared_generator():
    module, q = lorsa(groups=[0, 2, 1]), torch.randn(7, 8, dtype=torch.float64)
    for ours, shared in zip(module(q, 0), module.shared(q), strict=True):
        assert torch.equal(ours, shared)
    assert module.fold(0)[0] is module.shared.weight


def test_starts_as_the_shared_generator_alone():
    module, q = LORSA(8, SHAPES, 2, num_layers=2, rank=2), torch.randn(7, 8)
    assert not module.shared.weight.any() and module.shared.bias.std() > 0.1
    for layer in range(2):
        for ours, shared in zip(module(q, layer), module.shared(q), strict=True):
            assert torch.equal(ours, shared)


def test_kaiming_init_is_an_option():
    module = LORSA(8, SHAPES, 2, num_layers=2, shared_init="kaiming")
    bound = (6 / 8) ** 0.5
    assert 0.8 * bound < module.shared.weight.abs().max() <= bound


def test_private_only_starts_non_zero_and_learns():
    """With zero cores the ReLU behind the mixing would pass no gradient, for ever."""
    module, q = LORSA(8, SHAPES, 2, num_layers=1, rank=2, shared=False), torch.randn(7, 8)
    M, _ = module(q, 0)
    x = torch.relu(nn.functional.layer_norm(torch.randn(7, 2, 5, 4) @ M, (5, 4)))
    x.sum().backward()
    assert module.private[0].E.weight.grad[:4].abs().sum() > 0


def test_parameter_count_is_the_papers():
    """Table 1, W_S (128 x 64) from a query of 256, K averaging 2: 0.36 / 0.39 / 0.49 / 0.89 M of 2.10 M."""
    for rank, expected in {4: 0.36, 8: 0.39, 16: 0.49, 32: 0.89}.items():
        module = LORSA(256, [(128, 64)], 1, num_layers=6, rank=rank, groups=2)
        weights = [p for n, p in module.named_parameters() if not n.endswith("bias")]
        assert sum(p.numel() for p in weights) / 6 / 1e6 == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(groups=[1, 1]), "groups has 2 entries for 3 stages"),
        (dict(rank=0), "rank must be 1 or more, got 0"),
        (dict(rank=-1), "rank must be 1 or more, got -1"),
        (dict(shared_init="ones"), "shared_init must be one of zeros, kaiming, got 'ones'"),
        (dict(path="fast"), "path must be one of auto, weights, fold, got 'fast'"),
        (dict(groups=[1, 1, 0], shared=False), "groups is 0 for stage 2 while shared is off"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lorsa(**settings)


@pytest.mark.parametrize("module", [static, adaptive])
def test_files_import_nothing_but_torch(module):
    """Beside the standard library and this folder."""
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    assert found <= {"torch", "math", "collections", "typing"}
