"""Low rank fitted to a layer's outputs, ranks under a budget, and factorised convolutions."""

import itertools
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_lors.pela import LowRankConv2d, allocate, compress, decompress, second_moments
from mmdet_lors.pela.low_rank import best_factors


class Net(nn.Module):
    """Linears, and convolutions of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(16, 24, (3, 5), padding="same", dilation=2, bias=False)
        self.point = nn.Conv2d(24, 24, 1, stride=2)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.fc1, self.fc2 = nn.Linear(24, 40), nn.Linear(40, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.wide(self.stem(x)).relu()).relu()
        return self.fc2(self.fc1(self.depth(x).mean((2, 3))).relu())


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def images() -> list[Tensor]:
    # Correlated, so that outputs and weights want different directions.
    mix = torch.randn(3, 3, dtype=torch.float64) @ torch.diag(torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64))
    return [torch.einsum("dc,bchw->bdhw", mix, torch.randn(4, 3, 20, 28, dtype=torch.float64)) for _ in range(2)]


def inputs_and_outputs(net: nn.Module, images: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, what goes in and what comes out without the bias."""
    seen: dict[str, list] = {}
    hooks = [
        layer.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append((args[0], out)))
        for name, layer in net.named_children()
    ]
    with torch.no_grad():
        for batch in images:
            net(batch)
    for hook in hooks:
        hook.remove()
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in seen.items()}


def test_moments_are_those_of_the_inputs(net, images):
    net.train()
    moments = second_moments(net, images, omit=[], convolutions=True)
    assert net.training and list(moments) == ["stem", "wide", "point", "fc1", "fc2"]
    for name, (_, out) in inputs_and_outputs(net, images).items():
        if name == "depth":
            continue
        layer, moment = net.get_submodule(name).requires_grad_(False), moments[name]
        weight = layer.weight.flatten(1)
        # E |W x|^2 = tr(W C W^T), for which the order of a patch's entries must be the weight's.
        bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (out.dim() - 2))
        total = (out - bias).square().sum()
        places = out[:, 0].numel()
        assert torch.einsum("oi,ij,oj->", weight, moment.matrix, weight) * places == pytest.approx(total.item())
        assert moment.uses == places / len(images)


def test_float32_and_more_columns_than_one_block():
    x = torch.randn(50, 1100)
    moment = second_moments(nn.Sequential(nn.Linear(1100, 4)), [x], omit=[])["0"].matrix
    assert moment.dtype == torch.float64 and torch.allclose(moment, x.double().T @ x.double() / 50, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_calibrated_factors_are_the_best_for_the_outputs(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(500, shape[1], dtype=torch.float64) @ torch.randn(shape[1], shape[1], dtype=torch.float64)
    moment = x.T @ x / len(x)
    U, V = best_factors(weight, 7, moment)
    error = (x @ (weight - V @ U.T).T).square().sum()
    # What no rank of 7 can do better: the tail of the outputs' own singular values.
    tail = torch.linalg.svdvals(x @ weight.T)[7:].square().sum()
    assert error.item() == pytest.approx(tail.item(), rel=1e-4)
    assert torch.allclose(U.norm(dim=0), V.norm(dim=0))
    plain = best_factors(weight, 7)
    assert all(
        torch.allclose(a.abs(), b.abs(), atol=1e-6)
        for a, b in zip(best_factors(weight, 7, torch.eye(shape[1])), plain, strict=True)
    )
    full = best_factors(weight, 24, moment)
    assert torch.allclose(full[1] @ full[0].T, weight, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("kind", ["few images", "dead inputs", "nothing"])
def test_data_that_do_not_span_the_inputs(shape, kind):
    weight = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(5 if kind == "few images" else 100, shape[1], dtype=torch.float64)
    x[:, 10:] *= kind != "dead inputs"
    moment = (x.T @ x) * (kind != "nothing")
    for rank in (5, 12, 24):
        errors = [(weight - V @ U.T) for U, V in (best_factors(weight, rank, moment), best_factors(weight, rank))]
        calibrated, plain = ((error @ x.T).norm().item() for error in errors)
        assert calibrated <= plain * (1 + 1e-9) + 1e-9
    assert torch.allclose(errors[0], torch.zeros_like(weight), atol=1e-6)  # at full rank the weight itself comes back


def test_outputs_error_is_reported_and_never_above_plain_svd(net, images):
    pairs = inputs_and_outputs(net, images)
    plain, calibrated = (
        compress(net, 2, omit=[], convolutions=True, calibration=c)
        for c in (None, second_moments(net, images, [], True))
    )
    from_batches = compress(net, 2, omit=[], convolutions=True, calibration=images)[1]
    assert [layer.output_error for layer in from_batches] == [layer.output_error for layer in calibrated[1]]
    for a, b in zip(plain[1], calibrated[1], strict=True):
        x, out = pairs[a.name]
        bias = net.get_submodule(a.name).bias
        whole = out if bias is None else out - bias.view(-1, *[1] * (out.dim() - 2))
        found = [
            ((side[0].get_submodule(a.name)(x) - out).norm() / whole.norm()).item() for side in (plain, calibrated)
        ]
        assert found[1] == pytest.approx(b.output_error, rel=1e-6)
        assert found[1] < found[0] and a.error < b.error and a.output_error is None


def test_a_convolution_becomes_two_and_comes_back(net, images):
    with torch.no_grad():
        expected = net(images[0])
        small, report = compress(net, 1.5, omit=[], convolutions=True, ranks={"wide": 20})
        assert isinstance(small.wide, LowRankConv2d) and type(small.depth) is nn.Conv2d
        assert [layer.name for layer in report] == ["stem", "wide", "point", "fc1", "fc2"]
        x = torch.randn(2, 16, 9, 11, dtype=torch.float64)
        left, values, right = torch.linalg.svd(net.wide.weight.flatten(1), full_matrices=False)
        kernel = (left[:, :20] * values[:20] @ right[:20]).view(24, 16, 3, 5)
        assert torch.allclose(small.wide(x), F.conv2d(x, kernel, padding="same", dilation=2))
        plain = decompress(small)
        assert type(plain.stem) is nn.Conv2d and torch.allclose(plain(images[0]), small(images[0]))
        assert not torch.allclose(small(images[0]), expected)
        small.load_state_dict(net.state_dict())  # factorises
        again = compress(net, 1.5, omit=[], convolutions=True, ranks={"wide": 20})[0]
        assert torch.allclose(small(images[0]), again(images[0]))


def test_without_convolutions_they_stay(net):
    assert [layer.name for layer in compress(net, 2, omit=[])[1]] == ["fc1", "fc2"]


def test_a_padding_of_other_than_zeros_stays_whole():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 8, 3))
    with pytest.warns(UserWarning, match="0 is left whole: its padding is 'reflect', not zeros"):
        assert [layer.name for layer in compress(net, 2, omit=[], convolutions=True)[1]] == ["1"]


def test_a_whole_name_is_that_layers_alone():
    net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(12)])
    assert [(layer.name, layer.rank) for layer in compress(net, ranks={"1": 3})[1]] == [("1", 3)]
    ranks = [layer.rank for layer in compress(net, 4, ranks={"1": 3})[1]]
    assert ranks == [2, 3] + [2] * 10


def test_gradients_are_those_of_the_outputs(net, images):
    """Also where an activation is computed in place of the output, and of a frozen layer."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Linear(4, 3)).double()
    net[0].requires_grad_(False)
    x = torch.randn(7, 2, 6, dtype=torch.float64)  # the output is a view
    moments = second_moments(net, [x, x], [], loss=lambda out: out.square().sum())
    first = nn.functional.linear(x, net[0].weight, net[0].bias).requires_grad_()
    second = net[2](first.relu())
    out = net[3](second)
    gradients = torch.autograd.grad(out.square().sum(), [first, second, out])
    for name, gradient in zip("023", gradients, strict=True):
        assert moments[name].gradient == pytest.approx(gradient.square().mean().item(), rel=1e-6)
    assert not net[0].weight.requires_grad and all(p.grad is None for p in net.parameters())
    assert second_moments(net, [x], [])["0"].gradient is None


# ---------------------------------------------------------------- budget


def tail(weight: Tensor, rank: int) -> float:
    return torch.linalg.svdvals(weight.double())[rank:].square().sum().item()


def test_no_other_ranks_within_the_budget_leave_less():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(4, 7))
    for i, layer in enumerate(net):
        nn.init.normal_(layer.weight, std=1 + i)
    sizes = [range(1, layer.weight.numel() // sum(layer.weight.shape) + 1) for layer in net]
    bias = sum(layer.bias.numel() for layer in net)
    whole = {0: 54, 1: 36, 2: 28}
    units = [15, 13, 11]
    checked = 0
    for budget in range(bias + 40, bias + 118):
        found = allocate(net, parameters=budget, maximum=10)
        assert set(found.ranks) == {"0", "1", "2"}
        ranks = [found.ranks[str(i)] for i in range(3)]
        cost = sum(r * u for r, u in zip(ranks, units, strict=True))
        error = sum(tail(layer.weight, r) for layer, r in zip(net, ranks, strict=True))
        assert cost + bias <= budget and found.curve[-1][0] == cost + bias
        # The best of all: greedy is optimal for the budget that it spends to the full.
        best = min(
            sum(tail(layer.weight, r) for layer, r in zip(net, other, strict=True))
            for other in itertools.product(*sizes)
            if sum(r * u for r, u in zip(other, units, strict=True)) <= cost
        )
        everything = sum(tail(layer.weight, 0) for layer in net)
        assert found.curve[-1][1] == pytest.approx(error / everything, abs=1e-9)
        checked += error == pytest.approx(best)
    assert checked > 10
    assert allocate(net, parameters=bias + sum(whole.values())).ranks == {}  # all of it: nothing is factorised
    errors = [error for _, error in allocate(net, parameters=bias + 100).curve]
    assert errors == sorted(errors, reverse=True)


def test_what_is_compressed_has_what_was_paid(net, images):
    moments = second_moments(net, images, [], True)
    size = sum(p.numel() for p in net.parameters())
    with_loss = second_moments(net, images, [], True, loss=lambda out: out.square().sum())
    for calibration in (None, moments, with_loss):
        found = allocate(net, parameters=size // 2, omit=[], convolutions=True, calibration=calibration)
        small, _ = compress(net, None, [], found.ranks, convolutions=True, calibration=calibration)
        assert size * 0.45 < sum(p.numel() for p in small.parameters()) <= size // 2
        assert found.curve[-1][0] == sum(p.numel() for p in small.parameters())


def test_multiply_adds_count_how_often_a_layer_is_used(net, images):
    moments = second_moments(net, images, [], True)
    whole = {name: net.get_submodule(name).weight.numel() * m.uses for name, m in moments.items()}
    found = allocate(net, multiply_adds=0.4 * sum(whole.values()), omit=[], convolutions=True, calibration=moments)
    report = compress(net, None, [], found.ranks, convolutions=True)[1]
    spent = whole | {layer.name: layer.multiply_adds_after * moments[layer.name].uses for layer in report}
    assert 0.3 < sum(spent.values()) / sum(whole.values()) <= 0.4
    assert "fc2" not in found.ranks  # used once an image, it costs next to nothing


def test_what_the_loss_does_not_see_gets_the_least():
    net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(3)])
    moments = second_moments(net, [torch.randn(50, 20)], [], loss=lambda out: out.sum())
    seen = {name: replace(moment, gradient=float(name == "1")) for name, moment in moments.items()}
    # 60 biases, and 40 parameters a rank.
    assert allocate(net, parameters=500, omit=[], calibration=seen, maximum=10).ranks == {"0": 1, "1": 9, "2": 1}


def test_layers_that_share_a_weight_get_one_rank():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    net[2].weight = net[0].weight
    x = torch.randn(30, 16)
    moments = second_moments(net, [x], [], loss=lambda out: out.sum())
    found = allocate(net, parameters=400, omit=[], calibration=moments, maximum=16)
    assert found.ranks["0"] == found.ranks["2"]
    small, report = compress(net, None, [], found.ranks, calibration=moments)
    assert small[0].U is small[2].U and len(report) == 2 and sum(p.numel() for p in small.parameters()) <= 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(parameters=700), "700 parameters are below the 803 that rank 1 everywhere needs"),
        (dict(parameters=10**6), r"1,000,000 parameters are above the [0-9,]+ of the model"),
        (dict(), "give one budget: parameters or multiply_adds"),
        (dict(parameters=5000, multiply_adds=3), "give one budget"),
        (dict(multiply_adds=3), "multiply_adds needs calibration"),
        (dict(parameters=5000, minimum=0), "minimum must be 1 or more"),
        (
            dict(parameters=5000, minimum=4, maximum=3),
            "minimum must be 1 or more and maximum not below it, got 4 and 3",
        ),
    ],
)
def test_budget_refuses(settings, message, net):
    with pytest.raises(ValueError, match=message):
        allocate(net, omit=[], convolutions=True, **settings)


def test_calibration_refuses(net, images):
    settings = dict(omit=[], convolutions=True)
    with pytest.raises(ValueError, match="calibration has no batches"):
        compress(net, 2, calibration=[], **settings)
    with pytest.raises(ValueError, match="what goes into stem is not finite"):
        compress(net, 2, calibration=[images[0] * float("inf")], **settings)
    moments = second_moments(net, images, **settings)
    with pytest.raises(ValueError, match="calibration has nothing of stem"):
        compress(net, 2, calibration={k: v for k, v in moments.items() if k != "stem"}, **settings)
    with pytest.raises(ValueError, match=r"the moment of fc2 is \(24, 24\), its layer has 40 inputs"):
        compress(net, 2, calibration=dict(moments, fc2=moments["fc1"]), **settings)
    with pytest.raises(ValueError, match="calibration needs weights to approximate"):
        compress(net, 2, calibration=moments, approximate=False, **settings)
    with pytest.raises(ValueError, match="neither ratio nor ranks is given"):
        compress(net)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="calibration never reaches out_proj: not called by the model; omit it"):
        second_moments(attention, [(x, x, x)], [])


def test_a_vision_transformer_of_timm():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    x = torch.randn(8, 3, 32, 32)
    plain, calibrated = (compress(model, 4, calibration=c)[0] for c in (None, [x[:4], x[4:]]))
    with torch.no_grad():
        errors = [(m(x) - model(x)).norm().item() for m in (plain, calibrated)]
    assert errors[1] < errors[0]
