"""share_stack(kind="adaptive") against its equation, token by token, and everything that handles a model."""

import copy
import pickle

import pytest
import timm
import torch
from gradients import assert_two_processes_have_those_of_one, gradients, relative
from mmcv.cnn.bricks.wrappers import Linear as MMCVLinear
from torch import Tensor, nn

from mmdet_lors.lors import fold_stack, plain_stack, share_stack
from mmdet_lors.lors.computed import ComputedWeightError
from mmdet_lors.lors.stack import initial_stack
from mmdet_lors.pela import compress

SHAPES = [(6,), (4, 6), (2, 5, 6), (2, 3, 4, 6), (0, 5, 6)]


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def linears(condition: str = "token") -> nn.ModuleList:
    layers = nn.ModuleList(nn.Linear(6, 7) for _ in range(3)).double()
    share_stack(layers, "weight", rank=[2, 1, 2], groups=[3, 0, 1], kind="adaptive", condition=condition)
    return layers


def written_out(layers: nn.ModuleList, index: int, x: Tensor, h: Tensor) -> Tensor:
    """One token, one group at a time: the whole weight for this h, times x."""
    private = layers[index].weight_lorst.private
    weight, r = layers[0].weight_lorst.shared.clone(), private.rank
    for k in range(private.groups):
        rows = slice(k * r * r, (k + 1) * r * r)
        E = (private.E.weight[rows] @ h + private.E.bias[rows]).view(r, r)
        weight += private.B[:, k * r : (k + 1) * r] @ E @ private.A[k * r : (k + 1) * r]
    return weight @ x + layers[index].bias


@pytest.mark.parametrize("condition", ["token", "mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_is_that_of_a_weight_made_for_every_token(shape, condition):
    """For 'mean' h is the mean over all dims between the first and the last; of (6,) and (4, 6) over none."""
    layers = randomise(linears(condition))
    x = torch.randn(shape, dtype=torch.float64)
    h = x.mean(tuple(range(1, x.dim() - 1)), keepdim=True).expand_as(x) if condition == "mean" and x.dim() > 2 else x
    for i in (0, 2):
        found = layers[i](x)
        assert found.shape == (*shape[:-1], 7)
        rows = zip(x.reshape(-1, 6), h.reshape(-1, 6), found.reshape(-1, 7), strict=True)
        for token, condition_, y in rows:
            assert torch.allclose(y, written_out(layers, i, token, condition_), atol=1e-12)
    assert torch.equal(layers[1](x), x @ layers[0].weight_lorst.shared.T + layers[1].bias)  # K = 0


@pytest.mark.parametrize("init", ["first", "paper", "trained"])
def test_a_layer_starts_as_the_shared_weight(init):
    layers = nn.ModuleList(nn.Linear(60, 50) for _ in range(3))
    weights = [layer.weight.detach().clone() for layer in layers]
    report = share_stack(layers, "weight", rank=4, groups=2, init=init, kind="adaptive")
    x, shared = torch.randn(2, 60), layers[0].weight_lorst.shared
    for layer in layers:
        private = layer.weight_lorst.private
        assert torch.equal(layer(x), nn.functional.linear(x, shared, layer.bias))
        assert not private.E.weight.any() and not private.E.bias.any()
        for factor, size in ((private.A, 60), (private.B, 50)):
            assert 0.9 * (6 / (size * 4)) ** 0.5 < factor.abs().max() <= (6 / (size * 4)) ** 0.5
    mean = sum(weights) / 3
    if init == "paper":
        assert not any(torch.equal(shared, weight) for weight in weights)
    else:
        assert torch.allclose(shared, dict(first=weights[0], trained=mean)[init])
    if init == "trained":
        for weight, error in zip(weights, report["weight"], strict=True):
            assert error.fitted == pytest.approx(error.mean)
            assert error.fitted == pytest.approx(((weight - mean).norm() / weight.norm()).item(), rel=1e-4)
    else:
        assert report == {}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), MMCVLinear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


def blocks(condition: str = "token") -> nn.Sequential:
    """Two stacks, one of mmcv's Linears, and a layer without a private part."""
    model = nn.Sequential(*(Block() for _ in range(3)))
    share_stack(model, "fc?", rank=2, groups=[1, 0, 2], kind="adaptive", condition=condition)
    return randomise(model)


def test_names_are_those_of_a_static_stack_and_the_generators():
    private = [f"0.fc1.weight_lorst.private.{p}" for p in ("A", "B", "E.weight", "E.bias")]
    names = [name for name, _ in blocks().named_parameters() if ".fc1." in name]
    assert names == [
        "0.fc1.bias", "0.fc1.weight_lorst.shared", *private, "1.fc1.bias",
        "2.fc1.bias", *(name.replace("0.", "2.", 1) for name in private),
    ]  # fmt: skip


@pytest.mark.parametrize("condition", ["token", "mean"])
def test_gradients_reach_everything(condition):
    model = blocks(condition)
    assert all(gradient.any() for gradient in gradients(model, torch.randn(2, 5, 12)).values())
    layers, x = linears(condition).float(), torch.randn(2, 5, 6)
    found = gradients(layers[0], x)  # E is still zero: A and B wait for it
    assert found["weight_lorst.private.E.weight"].any() and found["weight_lorst.private.E.bias"].any()
    assert not found["weight_lorst.private.A"].any() and not found["weight_lorst.private.B"].any()
    layers = linears(condition)
    randomise(layers)
    inputs = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layers[2], inputs)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_complete_and_its_own(how):
    model, x = blocks(), torch.randn(2, 5, 12)
    before, copied = model(x), how(model)
    assert torch.equal(copied(x), before) and list(copied.state_dict()) == list(model.state_dict())
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    copied[0].fc1.weight_lorst.shared.data += 1  # which the copy's last layer follows
    assert torch.equal(model(x), before)
    assert relative(copied[2].fc1(x), model[2].fc1(x)) > 0.1
    model.load_state_dict(copied.state_dict())
    assert torch.equal(model(x), copied(x))


def test_a_layer_stays_the_same_object():
    layers = [nn.Linear(6, 7) for _ in range(2)]
    seen = []
    layers[1].register_forward_hook(lambda module, x, y: seen.append(module))
    before = copy.copy(layers)
    share_stack(layers, "weight", rank=2, kind="adaptive")
    layers[1](torch.randn(3, 6))
    assert seen == [layers[1]] and layers == before and all(isinstance(layer, nn.Linear) for layer in layers)


def test_autocast():
    """Products in bfloat16, parameters and their gradients in float32."""
    model, x = blocks("mean"), torch.randn(2, 5, 12)
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0].fc1(x).dtype == torch.bfloat16
        mixed = model(x)
    assert 0 < (mixed - plain).abs().max() < 0.05 * plain.abs().max()
    mixed.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("condition", ["token", "mean"])
def test_compiles_without_a_graph_break_and_exports(condition):
    torch._dynamo.reset()
    model, x = blocks(condition), torch.randn(2, 5, 12)
    expected, expected_gradients = model(x), gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    for name, gradient in gradients(compiled, x).items():
        assert relative(gradient, expected_gradients[name.removeprefix("_orig_mod.")]) < 1e-4, name
    model[0].fc1.weight_lorst.shared.data.mul_(2)
    assert torch.allclose(compiled(x), model(x), atol=1e-5) and not torch.allclose(model(x), expected, atol=1e-2)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)


def parallel_model() -> nn.Module:
    torch.manual_seed(5)
    return blocks().double()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    assert_two_processes_have_those_of_one(parallel_model, torch.randn(2, 5, 12).double(), tmp_path)


def test_a_frozen_layer_stays_frozen():
    layers = nn.ModuleList(nn.Linear(6, 7) for _ in range(3))
    layers[1].requires_grad_(False)
    share_stack(layers, "weight", rank=2, kind="adaptive")
    assert {name for name, p in layers.named_parameters() if not p.requires_grad} == {
        "1.bias", *(f"1.weight_lorst.private.{p}" for p in ("A", "B", "E.weight", "E.bias"))
    }  # fmt: skip


def test_new_initial_weights_start_the_stack_again_and_no_others_do():
    model, x = blocks(), torch.randn(2, 5, 12)
    known, before = list(model.parameters()), model(x)
    with initial_stack(model):
        assert torch.equal(model[2].fc1.weight, model[0].fc1.weight)  # W_shared
    assert torch.equal(model(x), before)
    with initial_stack(model):
        first = randomise(model[0].fc1).weight.detach().clone()
    for i in (0, 2):
        assert torch.equal(model[i].fc1(x), x @ first.T + model[i].fc1.bias)
    assert [id(p) for p in known] == [id(p) for p in model.parameters()]


def test_reading_or_writing_the_weight_is_refused():
    layer = linears()[2]
    for attempt in (
        lambda: layer.weight,
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(7, 6))),
        lambda: nn.functional.linear(torch.zeros(6), layer.weight),
    ):
        with pytest.raises(ComputedWeightError, match=r"^weight depends on the layer's input, .* call the layer;"):
            attempt()


def test_there_is_nothing_to_fold():
    model = blocks()
    for attempt in (lambda: fold_stack(model), lambda: plain_stack(model).__enter__()):
        message = "layers: fc1.weight: adaptive weights depend on the input: there is nothing to fold into"
        with pytest.raises(ValueError, match=message):
            attempt()
    assert torch.isfinite(model(torch.randn(2, 5, 12))).all()
    with pytest.raises(ValueError, match="0.fc1: its weight is computed, by StackedLinear"):
        compress(model, 2, omit=())


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def encoder_layers() -> list[nn.Module]:
    return [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]


def vit_blocks() -> list[nn.Module]:
    model = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, num_heads=3, depth=3)
    return list(model.blocks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(layers=encoder_layers(), targets="self_attn.in_proj_weight"),
            "targets: layer 0's self_attn.in_proj_weight is read by MultiheadAttention; adaptive are only Linears",
        ),
        (
            dict(layers=encoder_layers(), targets="self_attn.out_proj"),
            "targets: layer 0's self_attn.out_proj.weight is read by MultiheadAttention",
        ),
        (dict(layers=encoder_layers(), targets="linear?"), "layer 0's linear1.weight is read by TransformerEncoderLay"),
        (
            dict(layers=[nn.Linear(6, 6), Doubled(6, 6)], targets="weight"),
            r"targets: layer 1's weight is of a Doubled, which does more than x W\^T \+ b",
        ),
        (dict(kind="dynamic"), "kind must be one of static, adaptive, got 'dynamic'"),
        (dict(condition="class"), "condition must be one of token, mean, got 'class'"),
        (dict(kind="static", condition="mean"), "condition 'mean' is for kind='adaptive'"),
        (dict(rank=13, groups=2), r"rank: layer 0's mlp.fc1.weight has rank 13 x 2 groups = 26, above 24"),
    ],
)
def test_refuses_and_changes_nothing(settings, message):
    settings = dict(layers=vit_blocks(), targets="mlp.fc1", rank=2, kind="adaptive") | settings
    before = [list(layer.state_dict()) for layer in settings["layers"]]
    with pytest.raises(ValueError, match=message):
        share_stack(**settings)
    assert [list(layer.state_dict()) for layer in settings["layers"]] == before


def test_a_shared_layer_is_not_shared_again():
    layers = vit_blocks()
    share_stack(layers, "mlp.*", rank=2, kind="adaptive")
    with pytest.raises(ValueError, match="targets: layer 0's mlp.fc1.weight is shared already"):
        share_stack(layers, ["attn.*", "mlp.*"], rank=2)
    share_stack(layers, "attn.*", rank=2)  # static beside it
    assert torch.isfinite(nn.Sequential(*layers)(torch.randn(2, 5, 24))).all()
