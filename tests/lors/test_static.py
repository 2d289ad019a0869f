"""LORST against its equation, written out."""

import pytest
import torch
from torch import nn

from mmdet_lors.lors import LORST


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter non-zero, so that a dropped term shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def test_weight_is_shared_plus_the_sum_of_its_groups():
    lorst = randomise(LORST(6, 5, num_layers=2, rank=[2, 3], groups=[3, 1]))
    private = lorst.private[0]
    A, B = private.A.view(3, 2, 6), private.B.view(5, 3, 2)
    expected = lorst.shared + sum(B[:, k] @ A[k] for k in range(3))
    weight, bias = lorst.fold(0)
    assert torch.allclose(weight, expected, atol=1e-12)
    assert bias is lorst.bias[0]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_the_folded_linear(shared, bias):
    lorst = randomise(LORST(6, 5, num_layers=3, rank=2, groups=[1, 2, 3], shared=shared, bias=bias))
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    for layer in range(3):
        expected = nn.functional.linear(x, *lorst.fold(layer))
        assert torch.allclose(lorst(x, layer), expected, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_paths_agree_in_value_and_gradient(shared, layer):
    lorst = randomise(LORST(6, 5, num_layers=3, rank=2, groups=[1, 2, 3], shared=shared))
    x = torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for lorst.path in ("features", "fold"):
        lorst.zero_grad()
        x.grad = None
        out = lorst(x, layer)
        (out * out.detach().cos()).sum().backward()
        found.append([out.detach(), x.grad, *[p.grad.clone() for p in lorst.parameters() if p.grad is not None]])
    assert len(found[0]) == len(found[1]) == 5 + shared
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() <= 1e-11 * expected.norm()


def test_auto_takes_the_path_with_fewer_multiply_adds():
    """B A costs out * in per unit of rank, (x A^T) B^T costs in + out per row: 30 / 11 rows break even."""
    lorst = LORST(6, 5, num_layers=2, rank=2)
    assert [lorst.chosen_path(n) for n in (1, 2, 3, 1000)] == ["features", "features", "fold", "fold"]
    assert LORST(6, 5, num_layers=2, path="features").chosen_path(1000) == "features"


def test_a_layer_without_groups_is_the_shared_weight():
    lorst = randomise(LORST(6, 5, num_layers=2, rank=2, groups=[0, 1]))
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(lorst(x, 0), nn.functional.linear(x, lorst.shared, lorst.bias[0]))


def test_starts_as_the_shared_weight_alone():
    lorst = LORST(6, 5, num_layers=2, rank=2)
    for layer in range(2):
        weight, bias = lorst.fold(layer)
        assert torch.equal(weight, lorst.shared) and not bias.any()
    bound = 6**-0.5
    assert 0.5 * bound < lorst.shared.abs().max() <= bound


def test_parameter_count_is_the_papers():
    """Table 1: N_shared / 6 + r (in + out) per layer, 1.53 / 1.66 / 1.93 / 2.46 M of 8.39 M."""
    for rank, expected in {4: 1.53, 8: 1.66, 16: 1.93, 32: 2.46}.items():
        lorst = LORST(32768, 256, num_layers=6, rank=rank, bias=False)
        per_layer = sum(p.numel() for p in lorst.parameters()) / 6 / 1e6
        assert per_layer == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(groups=[1, 1]), "groups has 2 entries for 3 stages"),
        (dict(rank=[1, 2, 3, 4]), "rank has 4 entries for 3 stages"),
        (dict(rank=0), "rank must be 1 or more, got 0"),
        (dict(rank=-2), "rank must be 1 or more, got -2"),
        (dict(groups=-1), "groups must be 0 or more, got -1"),
        (dict(rank=1.5), "rank must hold integers, got 1.5"),
        (dict(path="weights"), "path must be one of auto, features, fold, got 'weights'"),
        (dict(groups=[1, 0, 1], shared=False), "groups is 0 for stage 1 while shared is off"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        LORST(6, 5, num_layers=3, **settings)
