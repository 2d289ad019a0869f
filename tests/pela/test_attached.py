"""What is attached to a layer stays with it when it is compressed, shared or made plain again; no write is lost."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from mmdet_lors.lors import fold_stack, plain_stack, share_stack
from mmdet_lors.lors.computed import ComputedWeightError
from mmdet_lors.pela import LowRankLinear, compress, decompress


def compressed(model: nn.Sequential) -> nn.Sequential:
    return compress(model, 2, inplace=True)[0]


def shared(model: nn.Sequential) -> nn.Sequential:
    share_stack(model, "weight", rank=2)
    return model


def unshared(model: nn.Sequential) -> nn.Sequential:
    fold_stack(model)
    return model


WAYS = {"compress": (compressed, lambda m: decompress(m, inplace=True)), "share_stack": (shared, unshared)}


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))


def attach(layer: nn.Module, seen: list[str]) -> list:
    """Hooks of every kind; what removes them."""

    def note(name: str) -> Callable:
        return lambda *args, **kwargs: seen.append(name)

    handles = [
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre with kwargs"), with_kwargs=True),
        layer.register_forward_hook(note("forward")),
        layer.register_forward_hook(lambda m, args, kwargs, out: seen.append("with kwargs"), with_kwargs=True),
        layer.register_forward_hook(note("always"), always_call=True),
        layer.register_full_backward_pre_hook(note("backward pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_pre_hook(note("state dict pre")),
        layer.register_load_state_dict_pre_hook(note("load pre")),
        layer.register_load_state_dict_post_hook(note("load")),
    ]
    layer._register_state_dict_hook(note("state dict"))
    return handles


def use(model: nn.Module) -> None:
    model(torch.randn(2, 12, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_hooks_stay_and_can_be_removed(way):
    change, back = WAYS[way]
    model, seen = build(), []
    handles = attach(model[1], seen)
    use(model)
    expected = sorted(seen)
    assert len(set(expected)) == 11
    for turn in (change, back):
        turn(model)
        seen.clear()
        use(model)
        assert sorted(seen) == expected
    change(model)
    for handle in handles:
        handle.remove()
    seen.clear()
    use(model)
    assert seen == ["state dict"]


def test_hooks_stay_in_a_copy():
    model, seen = build(), []
    attach(model[1], seen)
    for copied in (compress(model, 2)[0], decompress(compress(model, 2)[0])):
        seen.clear()
        use(copied)
        assert len(set(seen)) == 11
    assert type(model[1]) is nn.Linear


def test_a_hook_that_changes_the_input_still_does():
    model = build()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    found = compress(model, 2)[0][0](torch.randn(3, 12))
    assert torch.allclose(found, model[0].bias.expand(3, 12))


@pytest.mark.parametrize("way", WAYS)
def test_objects_attributes_buffers_modes_and_switches_stay(way):
    change, back = WAYS[way]
    model = build().double()
    layers, biases = list(model), [layer.bias for layer in model]
    model[0].tag, model[0].weight.no_decay = "first", True
    model[0].register_buffer("scale", torch.ones(3))
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    for turn in (change, back):
        turn(model)
        assert all(a is b for a, b in zip(model, layers, strict=True))
        assert all(layer.bias is bias for layer, bias in zip(model, biases, strict=True))
        assert model[0].tag == "first" and "0.scale" in model.state_dict()
        assert [module.training for module in model] == [True, False, True]
        assert all(not module.training for module in model[1].modules())
        own = [n for n, p in model[1].named_parameters() if p.requires_grad]
        assert own == ["bias"] and not model[2].bias.requires_grad
        assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model[0].weight.requires_grad and [type(layer) for layer in model] == [nn.Linear] * 3
    assert list(model.state_dict())[:2] == ["0.weight", "0.bias"]


def test_attributes_of_a_weight_stay():
    model = build()
    model[0].weight.no_decay = True
    compressed(model)
    assert model[0].U.no_decay and model[0].V.no_decay
    assert decompress(model, inplace=True)[0].weight.no_decay


class Logged(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_the_class_comes_back():
    model = nn.Sequential(Logged(12, 12), nn.MultiheadAttention(12, 2).out_proj)
    kinds = [type(layer) for layer in model]
    again = decompress(copy.deepcopy(compress(model, 1.5)[0]))
    assert [type(layer) for layer in again] == kinds


def test_a_layer_that_is_held_elsewhere_too():
    model = build()
    model.probes = [model[1]]
    compressed(model)
    assert isinstance(model.probes[0], LowRankLinear) and model.probes[0] is model[1]


def test_what_plain_stack_freezes_stays_frozen():
    model = shared(build())
    with plain_stack(model):
        model[1].weight.requires_grad_(False)
    assert [p.requires_grad for p in model[1].weight_lorst.parameters()] == [False, False]
    assert all(p.requires_grad for p in model[0].weight_lorst.parameters())
    with plain_stack(model):
        model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


def lazy() -> nn.Module:
    return nn.LazyLinear(12)


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(12, 12), "weight", 0.5)


def pruned_bias() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(12, 12), "bias", 0.5)


def normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(12, 12))


def hooked() -> nn.Module:
    layer = nn.Linear(12, 12)
    layer.weight.register_hook(lambda gradient: 2 * gradient)
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(12, 12)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


SPECIAL = {
    lazy: "LazyLinear has no size before its first call",
    pruned: "its weight is computed, from weight_orig, weight_mask",
    pruned_bias: "its bias is computed, from bias_orig, bias_mask",
    normed: "its weight is computed, by ParametrizedLinear",
    hooked: "its weight has hooks of its own, which two factors cannot keep",
    patched: "its forward() was replaced",
}


@pytest.mark.parametrize("make", SPECIAL)
def test_what_factors_cannot_stand_in_for_is_left_whole(make):
    model = nn.Sequential(make(), nn.Linear(12, 12))
    with pytest.warns(UserWarning) as caught:
        found, report = compress(model, 1.5)
    assert [str(w.message) for w in caught] == [f"0 is left whole: {SPECIAL[make]}"]
    assert [layer.name for layer in report] == ["1"] and type(found[0]) is type(model[0])
    x = torch.randn(2, 12)
    if make is not lazy:
        assert torch.equal(found[0](x), model[0](x))
    with pytest.warns(UserWarning), pytest.raises(ValueError) as error:
        compress(nn.Sequential(make()), 1.5)
    assert str(error.value) == f"the model has no Linear to compress; 0: {SPECIAL[make]}"


def test_a_weight_with_hooks_is_not_shared():
    model = nn.Sequential(nn.Linear(12, 12), hooked())
    with pytest.raises(ValueError, match="targets: layer 1's weight has hooks of its own"):
        share_stack(model, "weight", rank=2)


class Conv1D(nn.Module):
    """As in transformers: a Linear whose weight is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 36))


def test_nothing_to_compress_names_what_there_is():
    blocks = nn.ModuleList(nn.ModuleDict(dict(c_attn=Conv1D(), norm=nn.LayerNorm(12))) for _ in range(2))
    model = nn.ModuleDict(dict(h=blocks, wte=nn.Embedding(5, 12), lm_head=nn.Linear(12, 5)))
    with pytest.raises(ValueError) as error:
        compress(model, 2)
    expected = "Conv1D (h.*.c_attn) and Embedding (wte): not an nn.Linear; lm_head: omitted"
    assert str(error.value) == f"the model has no Linear to compress; {expected}"
    with pytest.raises(ValueError, match=r"LowRankLinear \(\*\): not an nn.Linear"):
        compress(compressed(build()), 2)
    with pytest.raises(ValueError, match=r"Conv2d \(\*\): not an nn.Linear"):
        compress(nn.Sequential(nn.Conv2d(3, 3, 3)), 2)


def test_gpt_2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=1)
    with pytest.raises(
        ValueError, match=r"no Linear to compress; Conv1D \(transformer.h.\*.attn.c_attn, .*not an nn.Linear"
    ):
        compress(transformers.GPT2LMHeadModel(config), 2)


@torch.no_grad()
def out_of(function: Callable, w: Tensor, *args) -> None:
    function(*args, out=w)


WRITES = {
    "copy_": lambda w: w.copy_(torch.zeros(12, 12)),
    "add_": lambda w: w.add_(1),
    "zero_": lambda w: w.zero_(),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "row": lambda w: w[0].fill_(1),
    "chunk": lambda w: w.chunk(3)[1].mul_(2),
    "iterated": lambda w: next(iter(w)).zero_(),
    "transposed": lambda w: w.T.add_(1),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(12, 12)),
    "data.view": lambda w: w.data.view(-1)[:2].fill_(1),
    "data +=": lambda w: w.data.__iadd__(1),
    "data =": lambda w: setattr(w, "data", torch.zeros(12, 12)),
    "grad =": lambda w: setattr(w, "grad", torch.zeros(12, 12)),
    "detach": lambda w: w.detach().neg_(),
    "out": lambda w: out_of(torch.add, w, torch.ones(12, 12), 1),
    "init.zeros_": nn.init.zeros_,
    "init.normal_": nn.init.normal_,
    "init.kaiming_uniform_": nn.init.kaiming_uniform_,
    "init.xavier_normal_": nn.init.xavier_normal_,
    "init.orthogonal_": nn.init.orthogonal_,
    "init.trunc_normal_": nn.init.trunc_normal_,
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "relu": lambda w: nn.functional.relu(w, inplace=True),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
    "register_hook": lambda w: w.register_hook(print),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(144), [w]),
}
REMEDIES = {
    "compress": "write to U and V, or call fill",
    "share_stack": r"write within plain_stack\(layers\), or to weight_lorst",
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("way", WAYS)
def test_a_write_into_a_computed_weight_is_an_error(way, write):
    model = WAYS[way][0](build())
    before = model[1].weight.clone()
    with pytest.raises(ComputedWeightError, match=REMEDIES[way]) as error, torch.no_grad():
        WRITES[write](model[1].weight)
    assert "\n" not in str(error.value) and torch.equal(model[1].weight, before)
    with pytest.raises(ValueError, match="read-only"):
        model[1].weight.detach().numpy()[0] = 1


@pytest.mark.parametrize("value", [torch.zeros(12, 12), nn.Parameter(torch.zeros(12, 12)), None])
@pytest.mark.parametrize("way", WAYS)
def test_setting_a_computed_weight_is_an_error(way, value):
    model = WAYS[way][0](build())
    with pytest.raises(ComputedWeightError, match=REMEDIES[way]):
        model[1].weight = value


@pytest.mark.parametrize("way", WAYS)
def test_reading_gives_ordinary_tensors(way):
    model = WAYS[way][0](build())
    w = model[1].weight
    with torch.no_grad():
        assert w.clone().zero_().sum() == 0 and type(w + 1) is type(w.sum()) is type(w @ w) is Tensor
    assert type(copy.deepcopy(w.detach())) is Tensor and w.requires_grad and w.shape == (12, 12)
    w.square().sum().backward()
    assert any(p.grad is not None for p in model[1].parameters())


def test_fill_does_what_a_write_cannot():
    layer = compressed(build())[0]
    layer.fill(torch.ones(12, 12))
    assert torch.allclose(layer.weight, torch.ones(12, 12), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(layer(torch.randn(2, 12))) is Tensor
