"""A budget instead of ranks: the least error for its parameters, the same in share_stack, a config and the tool."""

import itertools

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from mmdet_lors.lors import LORSA, fold_stack, ranks_for_budget, share_stack
from mmdet_lors.lors.adaptive import PrivateLORSA
from mmdet_lors.lors.budget import adaptive_sizes, spend, static_sizes


class Layer(nn.Module):
    """Two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 6)


def stack(layers: int = 3) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(layers))


def parameters(layers: nn.Module) -> int:
    return sum(p.numel() for name, p in layers.named_parameters() if "bias" not in name)


def test_spend_finds_the_optimum_of_convex_errors():
    torch.manual_seed(0)
    options = [[(3 * n, e) for n, e in enumerate(sorted(torch.rand(4).tolist(), reverse=True))] for _ in range(3)]
    for part in options:  # convex: gains fall
        gains = sorted((a[1] - b[1] for a, b in itertools.pairwise(part)), reverse=True)
        part[1:] = [(3 * (i + 1), part[0][1] - sum(gains[: i + 1])) for i in range(3)]
    for budget in range(0, 28, 3):
        chosen, curve = spend(options, budget)
        found = sum(part[i][1] for part, i in zip(options, chosen, strict=True))
        least = min(
            sum(o[1] for o in every) for every in itertools.product(*options) if sum(o[0] for o in every) <= budget
        )
        assert found == pytest.approx(least) and curve[-1] == pytest.approx((budget, found))


def test_spend_skips_what_is_off_the_hull_and_stops_inside_a_step():
    sizes = [(0, 10.0), (1, 9.9), (2, 9.8), (4, 0.0), (5, 1.0)]
    assert spend([sizes], 4)[0] == [3] and spend([sizes], 9)[0] == [3]
    assert spend([sizes], 3)[0] == [2]


def test_no_other_ranks_of_this_cost_are_nearer():
    layers = stack()
    sizes = [part for name in "ab" for part in static_sizes([getattr(layer, name).weight for layer in layers])]
    sums = [[sum(size[i] for size in every) for i in (2, 3)] for every in itertools.product(*sizes)]
    _, curve = spend([[size[2:] for size in part] for part in sizes], 90)
    assert len(curve) == 1 + 3 * 3 + 3 * 2
    for cost, _ in curve:
        if 24 + cost > 72:
            break
        chosen = ranks_for_budget(layers, ["a", "b"], 24 + cost)
        ranks = [
            rank * groups
            for name in ("a.weight", "b.weight")
            for rank, groups in zip(chosen["rank"][name], chosen["groups"][name], strict=True)
        ]
        assert sum(part[rank].cost for part, rank in zip(sizes, ranks, strict=True)) == cost
        error = sum(part[rank].error for part, rank in zip(sizes, ranks, strict=True))
        assert error == pytest.approx(min(other for spent, other in sums if spent <= cost), abs=1e-9)


def test_share_stack_spends_it_and_a_config_takes_its_ranks():
    layers, same, configured = stack(), stack(), stack()
    chosen = ranks_for_budget(layers, "*", 60, share=[0, 1, 0])
    expected = share_stack(same, init="trained", share=[0, 1, 0], **chosen)
    report = share_stack(layers, "*", init="trained", share=[0, 1, 0], budget=60)
    assert report == expected and 50 < parameters(layers) <= 60
    assert all(torch.equal(a, b) for a, b in zip(layers.parameters(), same.parameters(), strict=True))

    MODELS.register_module(name="TestBudget", module=lambda: nn.Sequential(configured))
    try:
        stacks = [dict(layers="0", init="trained", share=[0, 1, 0], **chosen)]
        built = MODELS.build(dict(type="WithLORS", model=dict(type="TestBudget"), stacks=stacks))
    finally:
        MODELS.module_dict.pop("TestBudget")
    assert all(torch.equal(a, b) for a, b in zip(layers.parameters(), built.parameters(), strict=True))


def test_it_finds_ranks_that_lose_nothing():
    layers = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
    torch.manual_seed(0)
    change = torch.randn(6, 2) @ torch.randn(2, 8)
    with torch.no_grad():
        layers[1].weight.copy_(layers[0].weight + change)
        layers[2].weight.copy_(layers[0].weight - change)
    plain = [layer.weight.clone() for layer in layers]
    wrapped = [nn.Sequential(layer) for layer in layers]
    chosen = ranks_for_budget(wrapped, "0", 48 + 4 * 14)
    assert chosen == dict(targets=["0.weight"], rank={"0.weight": [1, 2, 2]}, groups={"0.weight": [0, 1, 1]})
    share_stack(wrapped, "0", init="trained", budget=48 + 4 * 14)
    fold_stack(wrapped)
    for layer, weight in zip(layers, plain, strict=True):
        assert torch.allclose(layer.weight, weight, atol=1e-6)


def test_sizes_of_lorsa_cost_what_it_has_and_leave_nothing_at_full_rank():
    torch.manual_seed(0)
    lorsa = LORSA(5, [(4, 4), (4, 4)], copies=2, num_layers=2)
    weights = [torch.randn(2 * (16 + 16), 5) for _ in range(2)]
    biases = [torch.randn(2 * (16 + 16)) for _ in range(2)]
    for layer, sizes in enumerate(adaptive_sizes(lorsa, weights, biases)):
        rest = [(p[layer] - (p[0] + p[1]) / 2).square().sum().item() for p in (weights, biases)]
        assert sizes[0][:3] == (1, 0, 0) and sizes[0].error == pytest.approx(sum(rest), rel=1e-5)
        for size in sizes[1:]:
            private = PrivateLORSA(5, [(4, 4), (4, 4)], 2, size.rank, size.groups)
            assert size.cost == sum(p.numel() for p in private.parameters())
        errors = {(size.rank, size.groups): size.error for size in sizes}
        assert set(errors) == {(1, 0), *itertools.product((1, 2, 4), range(1, 9))}
        assert errors[4, 1] < 1e-20 < errors[2, 1] < errors[1, 1] < sizes[0].error
        assert errors[1, 4] < errors[1, 3] < errors[1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(budget=21), "budget must be between 24, all W_shared, and 72, as now, got 21"),
        (dict(budget=73), "budget must be between 24, all W_shared, and 72, as now, got 73"),
        (dict(budget=50, init="first"), "budget chooses rank and groups, for init='trained' and kind='static'"),
        (dict(budget=50, kind="adaptive"), "budget chooses rank and groups, for init='trained' and kind='static'"),
        (dict(budget=50, rank=2), "budget chooses rank and groups"),
        (dict(budget=50, groups=[1, 1, 0]), "budget chooses rank and groups"),
    ],
)
def test_refuses(arguments, message):
    layers = stack()
    names = list(layers.state_dict())
    with pytest.raises(ValueError, match=message):
        share_stack(layers, "*", **dict(init="trained") | arguments)
    assert list(layers.state_dict()) == names


def test_needs_weights_with_values():
    layers = stack()
    with torch.no_grad():
        layers[1].b.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"budget needs trained weights: layer 1's b.weight has values that are not"):
        ranks_for_budget(layers, "*", 50)
    with torch.device("meta"), pytest.raises(ValueError, match=r"layer 0's a.weight has values that are not finite"):
        ranks_for_budget(stack(), "*", 50)
