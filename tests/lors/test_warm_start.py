"""Warm start: the fits recover what is of LORS form, and otherwise better the plain mean."""

import ast
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdet_lors.lors import LORSA, LORST, warm_start
from mmdet_lors.lors.warm_start import fit_adaptive, fit_lorsa_, fit_lorst_, fit_static, leading_left

SHAPES = [(24, 24), (32, 16)]


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter non-zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def lorsa(**settings) -> LORSA:
    return randomise(LORSA(**dict(query_dim=12, shapes=SHAPES, copies=2, num_layers=3, rank=3) | settings).double())


def lorst(**settings) -> LORST:
    return randomise(LORST(96, 40, **dict(num_layers=3, rank=3) | settings).double())


def folded(module: LORSA | LORST, layers: int = 3) -> tuple[list, list]:
    """The plain weights and biases that a LORS module is equal to."""
    pairs = [module.fold(i) for i in range(layers)]
    return [w.detach().clone() for w, _ in pairs], [b.detach().clone() for _, b in pairs]


def noise(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(3)]


def total(errors: list[float], weights: list[torch.Tensor]) -> float:
    return sum((e * w.norm()) ** 2 for e, w in zip(errors, weights, strict=True))


@pytest.mark.parametrize(("shape", "rank"), [((6, 40), 3), ((40, 6), 3), ((5, 5), 5)])
def test_leading_left_spans_what_the_svd_does(shape, rank):
    matrix = torch.randn(shape, dtype=torch.float64)
    ours, svd = leading_left(matrix, rank), torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    assert torch.allclose(ours @ ours.T, svd @ svd.T, atol=1e-9)
    assert torch.allclose(ours.T @ ours, torch.eye(rank, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("settings", [{}, dict(groups=[0, 1, 2]), dict(rank=[1, 2, 4]), dict(shared=False)])
def test_static_weights_of_lors_form_are_recovered(settings):
    true, x = lorst(**settings), torch.randn(5, 96, dtype=torch.float64)
    ours = lorst(**settings)
    errors = fit_lorst_(ours, *folded(true), turns=100)
    assert max(e.fitted for e in errors) < 1e-6
    for layer in range(3):
        assert torch.allclose(ours(x, layer), true(x, layer), atol=1e-4)
        assert torch.equal(ours.bias[layer], true.bias[layer])


@pytest.mark.parametrize("settings", [dict(groups=1), dict(groups=[0, 1, 1]), dict(rank=[1, 2, 4]), dict(shared=False)])
def test_generators_of_lors_form_are_recovered(settings):
    true, q = lorsa(**settings), torch.randn(5, 12, dtype=torch.float64)
    ours = lorsa(**settings)
    errors = fit_lorsa_(ours, *folded(true), turns=60)
    assert max(e.fitted for layer in errors for e in layer) < 1e-6
    for layer in range(3):
        for fitted, expected in zip(ours(q, layer), true(q, layer), strict=True):
            assert torch.allclose(fitted, expected, atol=1e-4)


def test_several_groups_come_nearer_than_one_and_than_the_mean():
    """Alternation may stop at a local optimum there: the claim is about the error, not about recovery."""
    plain = folded(lorsa(groups=2))
    fitted = {}
    for groups in (1, 2):
        errors = fit_lorsa_(lorsa(groups=groups), *plain, turns=30)
        assert all(e.fitted < e.mean for layer in errors for e in layer)
        fitted[groups] = max(e.fitted for layer in errors for e in layer)
    assert fitted[2] < 0.8 * fitted[1]


@pytest.mark.parametrize("shared", [True, False])
def test_static_error_never_grows_and_ends_below_mean_plus_svd(shared):
    weights = noise(20, 30)
    _, pairs, history = fit_static(weights, [2, 0 if shared else 1, 5], shared, turns=25)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(history, history[1:], strict=False))
    assert [B.shape[1] for B, _ in pairs] == [2, 0 if shared else 1, 5]
    if shared:
        assert history[-1] < 0.995 * history[0]
        mean = sum(weights) / 3
        svd = sum(torch.linalg.svdvals(w - mean)[r:].square().sum() for w, r in zip(weights, (2, 0, 5), strict=True))
        assert history[0] == pytest.approx(svd.item())


def test_adaptive_error_never_grows():
    _, fits, history = fit_adaptive(noise(10, 8, 7), [2, 3, 2], [1, 0, 3], turns=25)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(history, history[1:], strict=False))
    assert history[-1] < 0.99 * history[0]
    assert [len(fit) for fit in fits] == [1, 0, 3]


def test_adaptive_history_is_the_error_of_what_is_returned():
    tensors = noise(10, 8, 7)
    common, fits, history = fit_adaptive(tensors, [2, 3, 2], [1, 0, 3], turns=5)
    left = [
        t - common - sum(torch.einsum("ib,ban,aj->ijn", *g) for g in fit) for t, fit in zip(tensors, fits, strict=True)
    ]
    assert sum(rest.square().sum().item() for rest in left) == pytest.approx(history[-1])


def test_full_rank_leaves_no_error():
    weights, biases = noise(40, 96), noise(40)
    assert max(e.fitted for e in fit_lorst_(lorst(rank=40), weights, biases, turns=2)) < 1e-10
    size = 2 * sum(rows * cols for rows, cols in SHAPES)
    for shared in (True, False):
        errors = fit_lorsa_(lorsa(rank=32, shared=shared), noise(size, 12), noise(size), turns=2)
        assert max(e.fitted for layer in errors for e in layer) < 1e-10


def test_never_worse_than_the_mean_of_the_layers():
    weights, biases = noise(40, 96), noise(40)
    errors = fit_lorst_(lorst(rank=1), weights, biases, turns=3)
    assert total([e.fitted for e in errors], weights) < total([e.mean for e in errors], weights)
    size = 2 * sum(rows * cols for rows, cols in SHAPES)
    weights, biases = noise(size, 12), noise(size)
    errors = fit_lorsa_(lorsa(rank=1, groups=[0, 1, 2]), weights, biases, turns=3)
    assert sum(e.fitted**2 for layer in errors for e in layer) < sum(e.mean**2 for layer in errors for e in layer)


def test_shared_alone_becomes_the_mean():
    weights, biases = noise(40, 96), noise(40)
    ours = lorst(groups=0)
    errors = fit_lorst_(ours, weights, biases, turns=2)
    assert torch.allclose(ours.shared, sum(weights) / 3, atol=1e-12)
    assert all(math.isclose(e.fitted, e.mean, rel_tol=1e-9) for e in errors)


def test_a_direction_with_nothing_to_fit_can_still_learn():
    """One layer is its own mean: B stays zero, and A must not be zero, too."""
    ours = randomise(LORST(6, 5, num_layers=1, rank=2).double())
    fit_lorst_(ours, [torch.randn(5, 6, dtype=torch.float64)], [torch.zeros(5)])
    assert not ours.private[0].B.any() and ours.private[0].A.abs().min() > 0


def test_single_precision_modules_and_weights():
    weights, biases = folded(lorst())
    ours = LORST(96, 40, num_layers=3, rank=3)
    errors = fit_lorst_(ours, [w.float() for w in weights], [b.float() for b in biases], turns=100)
    assert ours.shared.dtype == torch.float32 and max(e.fitted for e in errors) < 1e-6
    weights, biases = folded(lorsa())
    ours = LORSA(12, SHAPES, 2, num_layers=3, rank=3)
    errors = fit_lorsa_(ours, [w.float() for w in weights], [b.float() for b in biases], turns=100)
    assert ours.shared.weight.dtype == torch.float32 and max(e.fitted for layer in errors for e in layer) < 1e-6


def test_file_imports_nothing_but_torch():
    """Beside the standard library and this folder."""
    found = set()
    for node in ast.walk(ast.parse(Path(warm_start.__file__).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    assert found <= {"torch", "itertools", "collections", "typing"}
