"""PELA's factorisation: the best of its rank, the paper's counts, and models harder than a stack of Linears."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mmdet_lors.lors import AdaptiveWeights
from mmdet_lors.pela import OMIT, LowRankLinear, compress, decompress
from mmdet_lors.pela.low_rank import best_factors


def mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*layers)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_error_is_the_tail_of_the_singular_values(shape):
    weight = torch.randn(shape)
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 7, 20):
        U, V = (factor.double() for factor in best_factors(weight, rank))
        assert U.shape == (shape[1], rank) and V.shape == (shape[0], rank)
        error, tail = (weight.double() - V @ U.T).norm(), values[rank:].square().sum().sqrt()
        assert error == pytest.approx(tail.item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_each_factor_has_half_of_each_singular_value(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    U, V = best_factors(weight, 9)
    expected = torch.diag(torch.linalg.svdvals(weight)[:9])
    assert torch.allclose(U.T @ U, expected, atol=1e-9) and torch.allclose(V.T @ V, expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_full_rank_changes_nothing(shape):
    linear = nn.Linear(shape[1], shape[0])
    x = torch.randn(3, 5, shape[1])
    assert torch.allclose(LowRankLinear.take(copy.deepcopy(linear), 24)(x), linear(x), atol=1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(6, 8), torch.ones(6, 8), torch.ones(8, 6)])
def test_a_weight_of_lower_rank_is_exact_and_every_direction_can_learn(weight):
    layer = LowRankLinear.take(nn.Linear(*weight.shape[::-1]), 4, approximate=False)
    layer.fill(weight)
    assert torch.allclose(layer.weight, weight, atol=1e-6)
    layer(torch.randn(5, weight.shape[1])).square().sum().backward()
    layer(torch.randn(5, weight.shape[1])).sum().backward()
    alive = layer.U.grad.abs().sum(0) + layer.V.grad.abs().sum(0)
    assert (alive > 0).all()


@pytest.mark.parametrize(
    ("name", "ratio", "omit", "before", "after"),
    [
        ("deit_base_patch16_224", 2, OMIT, 86_567_656, 44_081_896),
        ("swin_base_patch4_window7_224", 1.5, (*OMIT, "attn.proj"), 87_768_224, 62_164_128),
        ("deit3_large_patch16_224", 2, OMIT, 304_374_760, 153_232_360),
    ],
)
def test_counts_of_the_papers_table_1(name, ratio, omit, before, after):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count(model) == before
    compressed, report = compress(model, ratio, omit, approximate=False, inplace=True)
    assert count(compressed) == after
    assert sum(layer.parameters_before - layer.parameters_after for layer in report) == before - after
    assert all(layer.multiply_adds_after <= layer.multiply_adds_before / ratio for layer in report)


def test_report():
    model = mlp(12, 20, 8)
    _, (first, second) = compress(model, 2)
    assert (first.name, first.in_features, first.out_features, first.rank) == ("0", 12, 20, 3)
    assert first.parameters_before == count(model[0]) and first.parameters_after == 3 * 32 + 20
    assert (second.multiply_adds_before, second.multiply_adds_after) == (160, 2 * 28)
    weight = model[0].weight.double()
    tail = torch.linalg.svdvals(weight)[3:].square().sum().sqrt() / weight.norm()
    assert first.error == pytest.approx(tail.item(), rel=1e-6)
    assert compress(model, 2, approximate=False)[1][0].error is None


def test_copy_or_in_place():
    model = mlp(12, 20, 8)
    weights = copy.deepcopy(model.state_dict())
    compressed, _ = compress(model, 2)
    assert compressed is not model and isinstance(model[0], nn.Linear)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    same, _ = compress(model, 2, inplace=True)
    assert same is model and isinstance(model[0], LowRankLinear)
    assert set(model.state_dict()) == {f"{i}.{part}" for i in (0, 1) for part in ("U", "V", "bias")}


def test_keeps_dtype_gradient_switch_and_mode():
    model = mlp(12, 20, 8).double().eval()
    model[0].requires_grad_(False)
    compressed, _ = compress(model, 2)
    assert {p.dtype for p in compressed.parameters()} == {torch.float64}
    assert [p.requires_grad for p in compressed[0].parameters()] == [False] * 3
    assert all(p.requires_grad for p in compressed[1].parameters()) and not compressed[0].training


def test_decompress_is_the_plain_architecture_and_the_same_function():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=32, num_classes=5)
    compressed, _ = compress(model, 2)
    plain = decompress(compressed)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(plain(x), compressed(x), atol=1e-5)
    assert not torch.allclose(plain(x), model(x), atol=1e-3)


def test_structure_alone_starts_as_new_linears_do():
    layer = compress(mlp(256, 256), 2, approximate=False)[0][0]
    expected = nn.Linear(256, 256).weight.std()
    assert layer.weight.std().item() == pytest.approx(expected.item(), rel=0.1)
    assert layer.U.std().item() == pytest.approx(layer.V.std().item(), rel=0.1)


def test_loads_what_it_replaces():
    model = mlp(12, 20, 8)
    expected, _ = compress(model, 2)
    structure, _ = compress(mlp(12, 20, 8), 2, approximate=False)
    state = model.state_dict()
    structure.load_state_dict(state)
    assert all(torch.equal(v, structure.state_dict()[k]) for k, v in expected.state_dict().items())
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    structure.load_state_dict(expected.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight: \(21, 12\) in the checkpoint, \(20, 12\)"):
        structure.load_state_dict(mlp(12, 21, 8).state_dict())
    with pytest.raises(RuntimeError, match="0.weight holds values that are not finite"):
        structure.load_state_dict(dict(state, **{"0.weight": torch.full((20, 12), float("nan"))}))


def test_attention_that_reads_its_projections_weight():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    compressed, report = compress(model, 1.2, omit=())
    assert [layer.name for layer in report] == ["self_attn.out_proj", "linear1", "linear2"]
    x = torch.randn(2, 5, 16)
    assert torch.allclose(compressed(x), decompress(compressed)(x), atol=1e-5)
    with torch.no_grad():
        # nn.TransformerEncoderLayer's fused path, which reads all weights.
        assert torch.allclose(compressed.eval()(x), compressed.train()(x), atol=1e-5)
    compressed.train()(x).square().sum().backward()
    assert compressed.self_attn.out_proj.U.grad.abs().sum() > 0


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Logged(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_subclasses_are_compressed_if_they_do_what_a_linear_does():
    model = nn.ModuleDict(
        dict(plain=Logged(12, 12), scaled=Scaled(12, 12), generator=AdaptiveWeights(12, [(2, 3)], copies=2))
    )
    with pytest.warns(UserWarning) as caught:
        _, report = compress(model, 1.5)
    assert [layer.name for layer in report] == ["plain"]
    assert [str(w.message) for w in caught] == [
        "scaled is left whole: Scaled does more than x W^T + b",
        "generator is left whole: AdaptiveWeights does more than x W^T + b",
    ]


def test_a_subclass_is_recognised_without_its_weights():
    layer = Logged(12, 12)
    nn.init.constant_(layer.weight, float("nan"))
    assert len(compress(nn.Sequential(layer), 1.5, approximate=False)[1]) == 1
    assert len(compress(nn.Sequential(Logged(12, 12, device="meta")), 1.5, approximate=False)[1]) == 1


def test_a_computed_weight_is_left_whole():
    model = nn.ModuleDict(dict(a=parametrizations.weight_norm(nn.Linear(12, 12)), b=nn.Linear(12, 12)))
    with pytest.warns(UserWarning, match="a is left whole: its weight is computed"):
        _, report = compress(model, 1.5)
    assert [layer.name for layer in report] == ["b"]


def test_one_layer_in_two_places_stays_one():
    shared = nn.Linear(12, 12)
    compressed, report = compress(nn.ModuleDict(dict(a=shared, b=nn.Linear(12, 12), c=shared)), 1.5)
    assert compressed["a"] is compressed["c"] and [layer.name for layer in report] == ["a", "b"]
    plain = decompress(compressed)
    assert plain["a"] is plain["c"] and plain["a"] is not plain["b"]


def test_linears_with_one_weight_share_its_factors():
    model = nn.ModuleDict(dict(a=nn.Linear(12, 12), b=nn.Linear(12, 12)))
    model["b"].weight = model["a"].weight
    compressed, report = compress(model, 1.5)
    assert compressed["a"].U is compressed["b"].U and compressed["a"].V is compressed["b"].V
    assert compressed["a"].bias is not compressed["b"].bias and len(report) == 1
    plain = decompress(compressed)
    assert plain["a"].weight is plain["b"].weight and count(plain) == count(model)


def test_a_weight_that_an_embedding_uses_is_left_whole():
    model = nn.ModuleDict(dict(words=nn.Embedding(30, 12), out=nn.Linear(12, 30), inner=nn.Linear(12, 12)))
    model["out"].weight = model["words"].weight
    with pytest.warns(UserWarning, match="out is left whole: it shares its weight with words.weight"):
        compressed, report = compress(model, 1.5)
    assert compressed["out"].weight is compressed["words"].weight and [layer.name for layer in report] == ["inner"]


def test_ranks_override_the_ratio_and_the_longest_key_wins():
    _, report = compress(mlp(12, 20, 12, 12), 2, ranks={"": 2, "1": 4})
    assert [layer.rank for layer in report] == [2, 4, 2]


def test_omitting_what_the_model_does_not_have_warns_with_what_it_has():
    model = nn.ModuleDict(dict(blocks=mlp(12, 12, 12), head=nn.Linear(12, 12)))
    with pytest.warns(UserWarning, match=r"omit has 'atn', which no name of the model contains; .* blocks.\*, head$"):
        compress(model, 1.5, omit=(*OMIT, "atn"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(model, 1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ratio=0), "ratio must be above 0, got 0"),
        (dict(ratio=float("nan")), "ratio must be above 0, got nan"),
        (dict(ratio=5), r"ratio 5 leaves 1 \(4 x 20\) rank 0"),
        (
            dict(ratio=0.5),
            r"ratio 0.5 makes 0 \(20 x 12\) larger: rank 15 has 480 parameters instead of 240; at most 7",
        ),
        (dict(ratio=2, ranks={"1": 0}), r"ranks\['1'\] leaves 1 \(4 x 20\) rank 0"),
        (dict(ratio=2, ranks={"1": 4}), r"ranks\['1'\] makes 1 \(4 x 20\) larger"),
        (dict(ratio=2, ranks={"1": 1.5}), r"ranks\['1'\] must be an integer, got 1.5"),
        (dict(ratio=2, ranks={"2": 1}), r"ranks has '2', which no compressed layer's name contains; they are \*"),
        (dict(ratio=2, omit="norm"), "omit must be a list of parts of names, got 'norm'"),
        (dict(ratio=2, omit=[""]), r"omit leaves no Linear to compress; the model has the Linears \*"),
    ],
)
def test_refuses(settings, message):
    model = mlp(12, 20, 4)
    with pytest.raises(ValueError, match=message):
        compress(model, inplace=True, **settings)
    assert isinstance(model[0], nn.Linear) and isinstance(model[1], nn.Linear)


def test_refuses_weights_it_cannot_factorise():
    model = mlp(12, 20, 8)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1.weight holds values that are not finite"):
        compress(model, 2, inplace=True)
    assert isinstance(model[0], nn.Linear)
    with pytest.raises(ValueError, match="0.weight is on the meta device: approximate must be False"):
        compress(mlp(12, 20).to("meta"), 2)
    with pytest.raises(ValueError, match="inplace needs a model that holds its layers"):
        compress(nn.Linear(12, 20), 2, inplace=True)
    assert isinstance(compress(nn.Linear(12, 20), 2)[0], LowRankLinear)
