"""share_stack against LORST's equation, the reference's vision transformer, and everything that handles a model."""

import ast
import copy
import io
import pickle
from pathlib import Path

import pytest
import timm
import torch
from gradients import assert_two_processes_have_those_of_one, gradients, relative
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from mmdet_lors.lors import fold_stack, plain_stack, share_stack, stack

GOLDEN = Path(__file__).parents[1] / "data/lors_vit.pt"
ATTENTION, FFN = [1] * 9 + [2, 4, 6], [6, 4, 2] + [1] * 9
LINEARS = ["attn.*", "mlp.*"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter non-zero, so that a dropped term shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def vit(depth: int = 4, **settings) -> nn.Module:
    defaults = dict(img_size=16, patch_size=4, embed_dim=24, num_heads=3, mlp_ratio=2, num_classes=5)
    return timm.models.VisionTransformer(depth=depth, **defaults | settings)


def deit_tiny() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", img_size=56, patch_size=4, num_classes=100)


def encoder(depth: int = 3) -> nn.ModuleList:
    return nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(depth))


def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def shared_vit() -> nn.Module:
    """Attention and FFN shared, ranks and groups that differ, one layer without a private part."""
    model = vit()
    share_stack(model.blocks, LINEARS, rank={"attn.*": 3, "mlp.*": [1, 2, 3, 4]}, groups=[1, 0, 2, 3])
    return randomise(model)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=dtype)


def test_weight_is_shared_plus_the_sum_of_its_groups():
    layers = nn.ModuleList(nn.Linear(6, 5) for _ in range(3)).double()
    share_stack(layers, "weight", rank=[2, 3, 1], groups=[2, 1, 4])
    randomise(layers)
    shared = layers[0].weight_lorst.shared
    for layer, r, K in zip(layers, [2, 3, 1], [2, 1, 4], strict=True):
        private = layer.weight_lorst.private
        A, B = private.A.view(K, r, 6), private.B.view(5, K, r)
        expected = shared + sum(B[:, k] @ A[k] for k in range(K))
        assert torch.allclose(layer.weight, expected, atol=1e-12)
        x = torch.randn(4, 6, dtype=torch.float64)
        assert torch.allclose(layer(x), x @ expected.T + layer.bias, atol=1e-12)


def reference_names(depth: int) -> dict[str, str]:
    """Our name -> the reference's, of every parameter."""
    names = {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj.weight": "patch_embed.projection.weight",
        "patch_embed.proj.bias": "patch_embed.projection.bias",
        "norm.weight": "ln1.weight",
        "norm.bias": "ln1.bias",
    }
    weights = {
        # ours: shared weight, private weights of layer i, index of the bias
        "attn.qkv": ("attn_lors.qkv", "attn_lors.qkv_private.{}", "attn_lors.bias_per_layer.{}.0"),
        "attn.proj": ("attn_lors.proj", "attn_lors.proj_private.{}", "attn_lors.bias_per_layer.{}.1"),
        "mlp.fc1": ("ffn_lors.layers.0.0", "ffn_lors.layers_private.{}.0", "ffn_lors.bias_per_layer.{}.0"),
        "mlp.fc2": ("ffn_lors.layers.1.0", "ffn_lors.layers_private.{}.1", "ffn_lors.bias_per_layer.{}.1"),
    }
    for ours, (shared, private, bias) in weights.items():
        names[f"blocks.0.{ours}.weight_lorst.shared"] = f"{shared}.weight"
        for i in range(depth):
            names[f"blocks.{i}.{ours}.weight_lorst.private.A"] = private.format(i) + ".0.weight"
            names[f"blocks.{i}.{ours}.weight_lorst.private.B"] = private.format(i) + ".1.weight"
            names[f"blocks.{i}.{ours}.bias"] = bias.format(i)
    for i in range(depth):
        for n in (1, 2):
            names |= {f"blocks.{i}.norm{n}.{p}": f"layers.{i}.ln{n}.{p}" for p in ("weight", "bias")}
    return names


def test_golden_values_come_out_of_a_plain_vit():
    golden = torch.load(GOLDEN)
    arch = golden["arch"]
    model = timm.models.VisionTransformer(
        img_size=golden["img_size"],
        patch_size=golden["patch_size"],
        embed_dim=arch["embed_dims"],
        depth=arch["num_layers"],
        num_heads=arch["num_heads"],
        mlp_ratio=arch["feedforward_channels"] / arch["embed_dims"],
        num_classes=0,
    ).double()
    share_stack(
        model.blocks,
        ["attn.*", "mlp.*"],
        rank={"attn.*": golden["attn_kernel_sizes"], "mlp.*": golden["ffn_kernel_sizes"]},
        groups={"attn.*": golden["attn_kernel_groups"], "mlp.*": golden["ffn_kernel_groups"]},
    )
    names = reference_names(arch["num_layers"])
    assert sorted(names.values()) == sorted(golden["state_dict"])
    model.load_state_dict({ours: golden["state_dict"][theirs] for ours, theirs in names.items()}, strict=True)

    x = golden["x"].clone().requires_grad_()
    tokens = model.forward_features(x)
    patches, cls = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), tokens[:, 0]
    assert relative(patches, golden["patch_tokens"]) < 1e-8
    assert relative(cls, golden["cls_token"]) < 1e-8
    (patches.square().sum() + cls.square().sum()).backward()
    assert relative(x.grad, golden["x_grad"]) < 1e-8
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, golden["grads"][names[name]]) < 1e-8, name


def test_deit_tiny_has_the_papers_parameters():
    model = deit_tiny()
    assert count(model.blocks) == 5_338_368
    share_stack(model.blocks, LINEARS, rank=32, groups={"attn.*": ATTENTION, "mlp.*": FFN})
    assert count(model.blocks) == 2_536_704


def test_the_papers_start_is_kaiming_whatever_the_weights_are():
    first, second = ([nn.Linear(300, 200) for _ in range(2)] for _ in range(2))
    for layers, init in ((first, "first"), (second, "paper")):
        for layer in layers:
            nn.init.constant_(layer.weight, 7.0)
        share_stack(layers, "weight", init=init)
        weight = layers[0].weight_lorst
        assert weight.private.A.any() and not weight.private.B.any()
        assert torch.equal(layers[1].weight, weight.first.shared)
    assert (first[0].weight == 7).all()
    bound = 300**-0.5  # Kaiming-uniform with a = sqrt(5), which is what nn.Linear does
    assert second[0].weight.abs().max() <= bound
    assert second[0].weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_full_rank_from_trained_weights_keeps_the_outputs(dtype, tolerance):
    model = deit_tiny().eval().to(dtype)
    for name, parameter in model.blocks.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, 3, 56, 56, dtype=dtype)
    with torch.no_grad():
        before = model(x)
        report = share_stack(model.blocks, LINEARS, rank=192, init="trained")
        assert relative(model(x), before) < tolerance
    assert list(report) == [f"{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    for errors in report.values():
        assert len(errors) == 12 and all(e.fitted < tolerance and e.mean > 0.5 for e in errors)


def test_folding_after_training_keeps_the_outputs_and_gives_the_plain_architecture():
    model, plain = deit_tiny(), deit_tiny().eval()
    share_stack(model.blocks, LINEARS, rank=32, groups={"attn.*": ATTENTION, "mlp.*": FFN})
    optimizer, x = torch.optim.AdamW(model.parameters(), 1e-3), torch.randn(2, 3, 56, 56)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(block.attn.qkv.weight_lorst.private.B.any() for block in model.blocks)
    model.eval()
    with torch.no_grad():
        before = model(x)
        fold_stack(model.blocks)
        assert (model(x) - before).abs().max() < 1e-6
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), model(x))


def test_folded_layers_share_nothing():
    layers = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))
    share_stack(layers, "weight", groups=0)
    fold_stack(layers)
    layers[1].weight.data += 1
    assert not torch.equal(layers[0].weight, layers[1].weight) and torch.equal(layers[0].weight, layers[2].weight)


def test_paper_initialisation_starts_every_layer_as_the_first():
    model = vit()
    first = model.blocks[0].mlp.fc1.weight.detach().clone()
    biases = [randomise(block.mlp.fc1).bias.detach().clone() for block in model.blocks[1:]]
    model.blocks[0].mlp.fc1.weight.data.copy_(first)
    assert share_stack(model.blocks, "mlp.fc1", rank=4) == {}
    for block in model.blocks:
        private = block.mlp.fc1.weight_lorst.private
        assert torch.equal(block.mlp.fc1.weight, first)
        assert not private.B.any()
        assert 0.8 * (bound := (6 / 24) ** 0.5) < private.A.abs().max() <= bound
    for block, bias in zip(model.blocks[1:], biases, strict=True):
        assert torch.equal(block.mlp.fc1.bias, bias)


def test_trained_initialisation_is_mean_plus_truncated_svd():
    layers = nn.ModuleList(nn.Linear(7, 5) for _ in range(3)).double()
    weights = [layer.weight.detach().clone() for layer in layers]
    report = share_stack(layers, "weight", rank=1, groups=[0, 2, 5], init="trained")
    mean = sum(weights) / 3
    assert torch.allclose(layers[0].weight, mean, atol=1e-12)
    for layer, weight, rank, error in zip(layers, weights, [0, 2, 5], report["weight"], strict=True):
        U, S, V = torch.linalg.svd(weight - mean)
        best = mean + U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank]
        assert torch.allclose(layer.weight, best, atol=1e-10)
        assert error.mean == pytest.approx(((weight - mean).norm() / weight.norm()).item())
        assert error.fitted == pytest.approx(((weight - best).norm() / weight.norm()).item(), abs=1e-10)


def test_more_turns_find_weights_that_are_of_lors_form():
    layers = nn.ModuleList(nn.Linear(24, 20) for _ in range(4)).double()
    share_stack(layers, "weight", rank=2)
    randomise(layers)
    fold_stack(layers)
    once, often = copy.deepcopy(layers), layers
    (errors_once,) = share_stack(once, "weight", rank=2, init="trained").values()
    (errors_often,) = share_stack(often, "weight", rank=2, init="trained", turns=200).values()
    assert max(e.fitted for e in errors_once) > 0.05 and max(e.fitted for e in errors_often) < 1e-3


def test_every_other_layer():
    model = vit()
    originals = [block.mlp.fc1.weight.detach().clone() for block in model.blocks]
    share_stack(model.blocks, "mlp.fc1", rank=2, share=["odd", "even", "odd", "even"])
    held = [hasattr(block.mlp.fc1.weight_lorst, "shared") for block in model.blocks]
    assert held == [True, True, False, False]
    for block, original in zip(model.blocks, [originals[i] for i in (0, 1, 0, 1)], strict=True):
        assert torch.equal(block.mlp.fc1.weight, original)


def test_trained_errors_of_every_other_layer_are_in_the_layers_order():
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
    layers[2].load_state_dict(layers[0].state_dict())
    (errors,) = share_stack(layers, "weight", share=[0, 1, 0, 1], groups=0, init="trained").values()
    assert [e.fitted > 0.1 for e in errors] == [False, True, False, True]


def test_without_groups_the_stack_is_recurrent():
    model, block = vit(), count(vit().blocks[0])
    share_stack(model.blocks, LINEARS, groups=0)
    own = sum(p.numel() for p in model.blocks[1].parameters())
    assert count(model.blocks) == block + 3 * own and own < 0.06 * block
    assert model.blocks[3].attn.qkv.weight is model.blocks[0].attn.qkv.weight_lorst.shared


def test_targets_can_be_shared_one_after_the_other():
    model = vit()
    share_stack(model.blocks, "attn.*", rank=2)
    share_stack(model.blocks, "mlp.fc?", rank=3)
    assert model.blocks[1].attn.proj.weight_lorst.rank == 2 and model.blocks[1].mlp.fc2.weight_lorst.rank == 3
    fold_stack([model])
    assert list(model.state_dict()) == list(vit().state_dict())


@pytest.mark.parametrize("targets", ["self_attn.in_proj_weight", ["self_attn.*", "linear1", "linear2"]])
def test_multihead_attention(targets):
    """Training reads the weights in one way, PyTorch's fused inference path in another; the plain layers agree."""
    layers, x = encoder(), torch.randn(2, 5, 16)
    share_stack(layers, targets, rank=2, groups=[1, 2, 3])
    randomise(layers)
    trained = run(layers.train(), x)
    with torch.no_grad():
        assert torch.allclose(run(layers.eval(), x), trained, atol=1e-5)
    trained.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layers.parameters())
    fold_stack(layers)
    assert torch.allclose(run(layers.train(), x), trained, atol=1e-6)
    assert list(layers.state_dict()) == list(encoder().state_dict())


def test_attention_with_other_key_sizes_has_three_in_projections():
    layers = nn.ModuleList(nn.MultiheadAttention(16, 2, kdim=12, vdim=8, batch_first=True) for _ in range(2))
    share_stack(layers, "?_proj_weight", rank=2)
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 5, 12), torch.randn(2, 5, 8)
    before = randomise(layers)[1](q, k, v)[0]
    assert {name.split("_lorst")[0] for name, _ in layers[1].named_parameters() if "lorst" in name} == {
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
    }
    fold_stack(layers)
    assert torch.allclose(layers[1](q, k, v)[0], before, atol=1e-6)


def saved(state_dict: dict[str, Tensor]) -> int:
    file = io.BytesIO()
    torch.save(state_dict, file)
    return file.tell()


def test_state_dict_round_trip_and_its_size():
    """Copied tensor by tensor, as mmengine does, which would undo a sharing of storage."""
    model, x = shared_vit(), image()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    other = shared_vit()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), model(x))
    deit = deit_tiny()
    before = saved({k: v.clone() for k, v in deit.blocks.state_dict().items()})
    share_stack(deit.blocks, LINEARS, rank=32, groups={"attn.*": ATTENTION, "mlp.*": FFN})
    after = saved({k: v.clone() for k, v in deit.blocks.state_dict().items()})
    assert after / before == pytest.approx(2_536_704 / 5_338_368, abs=0.01)


def test_the_shared_weight_is_one_parameter_of_one_name():
    model = shared_vit()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(".shared")]
    names_of_modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert len(names) == 4 and all(name.startswith("blocks.0.") for name in names)
    assert len(names_of_modules) == len(set(names_of_modules)) == len(list(model.modules()))
    tensors = [p.data_ptr() for p in model.state_dict().values()]
    assert len(tensors) == len(set(tensors))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_complete_and_its_own(how):
    model, x = shared_vit(), image()
    before, copied = model(x), how(model)
    assert torch.equal(copied(x), before) and list(copied.state_dict()) == list(model.state_dict())
    copied.blocks[0].attn.qkv.weight_lorst.shared.data += 1
    assert torch.equal(model(x), before) and not torch.equal(copied(x), before)
    assert torch.equal(copied.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight + 1)
    fold_stack(copied.blocks)
    assert torch.equal(model(x), before) and torch.isfinite(copied(x)).all()


def test_moves_reach_every_layer():
    model, x = shared_vit(), image(torch.float64)
    state = {name: value.double() for name, value in model.state_dict().items()}
    expected = model.double()(x)
    for assign in (True, False):
        other = shared_vit()
        other(image())
        other.to("meta")
        if not assign:
            other.to_empty(device="cpu").double()
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), expected)
    half = model.to(torch.bfloat16).blocks[2].attn.qkv.weight
    assert half.dtype == torch.bfloat16


def test_autocast():
    """Products in bfloat16, parameters and their gradients in float32."""
    model, x = vit(), image()
    share_stack(model.blocks, LINEARS, rank=3, init="trained")
    seen = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, i, out: seen.append((out.dtype, m.weight.dtype)))
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    assert seen == [(torch.float32,) * 2, (torch.bfloat16,) * 2]
    assert 0 < (mixed.float() - plain).abs().max() < 0.05 * plain.abs().max()
    mixed.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


def shared_encoder() -> nn.Module:
    layers = encoder()
    share_stack(layers, ["self_attn.*", "linear?"], rank=2, groups=[0, 1, 2])
    return randomise(nn.Sequential(*layers))


@pytest.mark.parametrize(("build", "shape"), [(shared_vit, (2, 3, 16, 16)), (shared_encoder, (2, 5, 16))])
def test_compiles_without_a_graph_break(build, shape):
    torch._dynamo.reset()
    model, x = build(), torch.randn(shape)
    expected, expected_gradients = model(x), gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    for name, gradient in gradients(compiled, x).items():
        assert relative(gradient, expected_gradients[name.removeprefix("_orig_mod.")]) < 1e-4, name
    # Not compiled in as constants: every layer follows the shared weight, which one of them holds.
    for name, parameter in model.named_parameters():
        if name.endswith(".shared"):
            parameter.data.mul_(2)
    assert torch.allclose(compiled(x), model(x), atol=1e-5) and not torch.allclose(model(x), expected, atol=1e-2)


def test_exports():
    model, x = shared_vit().eval(), image()
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)
    assert sum(name.endswith(".shared") for name in exported.state_dict) == 4


def test_an_optimizer_decays_by_name():
    model = shared_vit()
    cfg = dict(
        optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
        paramwise_cfg=dict(
            norm_decay_mult=0.0,
            custom_keys={"_lorst.private": dict(decay_mult=0.0), "_lorst.shared": dict(decay_mult=2.0)},
        ),
    )
    optimizer = build_optim_wrapper(model, cfg).optimizer
    groups = [(p, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    decay = {id(p): value for p, value in groups}
    assert len(groups) == len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.0 if ".private." in name or "norm" in name else 0.1 if name.endswith(".shared") else 0.05
        assert decay[id(parameter)] == pytest.approx(expected), name


def parallel_model() -> nn.Module:
    torch.manual_seed(5)
    return shared_vit().double()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    assert_two_processes_have_those_of_one(parallel_model, image(torch.float64), tmp_path)


def test_a_frozen_layer_stays_frozen():
    layers = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))
    layers[1].requires_grad_(False)
    share_stack(layers, "weight", rank=2)
    frozen = {name for name, p in layers.named_parameters() if not p.requires_grad}
    assert frozen == {"1.bias", "1.weight_lorst.private.A", "1.weight_lorst.private.B"}
    layers.requires_grad_(False)
    fold_stack(layers)
    assert not any(p.requires_grad for p in layers.parameters()) and len(list(layers.parameters())) == 6


def test_plain_weights_are_loaded_into_a_shared_stack():
    plain, model, x = randomise(vit()), shared_vit(), image()
    share_stack(other := vit().blocks, LINEARS, rank=24, init="trained")
    model.blocks = other
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    known = [p for group in optimizer.param_groups for p in group["params"]]
    with plain_stack(model.blocks) as report:
        assert set(model.state_dict()) == set(plain.state_dict())
        model.load_state_dict(plain.state_dict())
    assert list(report) == ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    assert all(e.fitted < 1e-5 for errors in report.values() for e in errors)
    assert relative(model(x), plain(x)) < 1e-5
    assert {id(p) for p in known} == {id(p) for p in model.parameters()}


def test_a_stack_that_was_left_alone_is_not_fitted_again():
    model = shared_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with plain_stack([model]) as report:
        randomise(model.blocks[1].mlp.fc1)
    assert report == {}
    for name, value in model.state_dict().items():
        changed = "mlp.fc1" in name and ("lorst" in name or name == "blocks.1.mlp.fc1.bias")
        assert torch.equal(value, before[name]) != changed, name
    assert not model.blocks[2].mlp.fc1.weight_lorst.private.B.any()


def test_plain_stack_shares_again_after_an_error():
    model, x = shared_vit(), image()
    before = model(x)
    with pytest.raises(KeyError), plain_stack([model]):
        raise KeyError
    assert torch.equal(model(x), before) and hasattr(model.blocks[0].attn.qkv, "weight_lorst")


def test_weights_that_are_not_initialised_are_reported_as_not_fitted():
    layers = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))
    layers[1].weight.data[0, 0] = float("nan")
    (errors,) = share_stack(layers, "weight", rank=2, init="trained").values()
    assert all(e.fitted != e.fitted for e in errors)


def unlike(**settings) -> list[nn.Module]:
    return [*vit(2).blocks, *vit(1, **settings).blocks]


def twice() -> list[nn.Module]:
    blocks = list(vit(2).blocks)
    return [*blocks, blocks[0]]


def tied() -> list[nn.Module]:
    blocks = list(vit(3).blocks)
    blocks[2].mlp.fc1.weight = blocks[1].mlp.fc1.weight
    return blocks


def already() -> list[nn.Module]:
    blocks = list(vit(3).blocks)
    share_stack(blocks[1:], "attn.qkv", rank=2)
    return blocks


def parametrised() -> list[nn.Module]:
    blocks = list(vit(3).blocks)
    nn.utils.parametrizations.weight_norm(blocks[1].mlp.fc1)
    return blocks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layers=[]), "layers is empty"),
        (dict(layers=3), "layers must be a sequence of modules, got a int"),
        (dict(layers=[nn.Linear(2, 2), "x"]), r"layers\[1\] is a str, not an nn.Module"),
        (dict(layers=twice()), r"layers\[2\] is layers\[0\] itself"),
        (dict(layers=tied(), targets="mlp.*"), "layer 2's mlp.fc1.weight is layer 1's own parameter"),
        (
            dict(layers=unlike(embed_dim=48)),
            "layers: layer 2's attn.qkv.weight is 144 x 48, layer 0's is 72 x 24",
        ),
        (
            dict(layers=unlike(mlp_ratio=3), targets=LINEARS),
            "layers: layer 2's mlp.fc1.weight is 72 x 24, layer 0's is 48 x 24",
        ),
        (
            dict(layers=[*vit(1).blocks, *vit(1).double().blocks]),
            "layers: layer 1's attn.qkv.weight has dtype torch.float64, layer 0's has torch.float32",
        ),
        (
            dict(layers=unlike(mlp_layer=nn.Identity), targets="mlp.*"),
            r"targets\[0\] 'mlp.\*' matches nothing in layer 2; weights that can be shared there: attn.qkv, attn.proj",
        ),
        (
            dict(layers=[nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))], targets="*weight"),
            r"targets\[0\] '\*weight': layer 1 has 0.weight, layer 0 does not",
        ),
        (dict(layers=already()), "targets: layer 1's attn.qkv.weight is shared already"),
        (
            dict(layers=parametrised(), targets="mlp.fc1"),
            r"targets\[0\] 'mlp.fc1': layer 1's mlp.fc1: its weight is computed already, by ParametrizedLinear",
        ),
        (dict(targets=[]), "targets must be one or more names"),
        (dict(targets=7), "targets must be one or more names, got 7"),
        (dict(targets=["attn.qkv", 7]), r"targets\[1\] must be a name or pattern, got 7"),
        (dict(targets=["attn.qkv", "mlp.fc3"]), r"targets\[1\] 'mlp.fc3' matches nothing in layer 0"),
        (dict(targets="norm1"), r"targets\[0\] 'norm1': layer 0's norm1 is a LayerNorm, neither an nn.Linear"),
        (dict(targets="attn.qkv.bias"), r"targets\[0\] 'attn.qkv.bias': layer 0's attn.qkv.bias is a parameter"),
        (dict(targets=["attn.*", "attn.qkv"]), r"targets\[1\] 'attn.qkv' and 'attn.\*' both mean attn.qkv.weight"),
        (dict(rank=[1, 2]), "rank has 2 entries for 3 layers"),
        (dict(groups=[1, 2, 3, 4]), "groups has 4 entries for 3 layers"),
        (dict(groups={"attn.qkv": [1, 2]}), r"groups\['attn.qkv'\] has 2 entries for 3 layers"),
        (dict(rank={"mlp.fc1": 2}), "rank has an entry for 'mlp.fc1', which is none of the targets"),
        (dict(rank={"attn.qkv": 2}, targets=["attn.qkv", "mlp.fc1"]), "rank has no entry for target 'mlp.fc1'"),
        (dict(rank=0), "rank must be 1 or more, got 0"),
        (dict(rank=1.5), "rank must hold integers, got 1.5"),
        (dict(rank="8"), "rank must hold integers, got '8'"),
        (dict(groups=[1, -1, 1]), "groups must be 0 or more, got -1"),
        (
            dict(rank=[8, 8, 9], groups=[1, 3, 3]),
            r"rank: layer 2's attn.qkv.weight has rank 9 x 3 groups = 27, above 24, the smaller side",
        ),
        (dict(share=[0, 1]), "share has 2 entries for 3 layers"),
        (dict(share=2), "share is 2, no list for 3 layers"),
        (dict(share=[0, [1], 0]), r"share\[1\] must be a number or a name, got \[1\]"),
        (dict(init="svd"), "init must be one of first, paper, trained, got 'svd'"),
        (dict(turns=0), "turns must be 1 or more, got 0"),
    ],
)
def test_refuses_and_changes_nothing(settings, message):
    settings = dict(layers=list(vit(3).blocks), targets="attn.qkv", rank=2) | settings
    modules = [m for m in settings["layers"] if isinstance(m, nn.Module)] if settings["layers"] != 3 else []
    before = [list(m.state_dict()) for m in modules]
    with pytest.raises(ValueError, match=message):
        share_stack(**settings)
    assert [list(m.state_dict()) for m in modules] == before


def test_refuses_to_fold_what_is_not_there_or_not_whole():
    with pytest.raises(ValueError, match="layers: none of them has a shared weight"):
        fold_stack(vit().blocks)
    model = shared_vit()
    with pytest.raises(ValueError, match="attn.qkv.weight is shared by 4 layers, of which only 2 are here"):
        fold_stack(model.blocks[:2])
    with pytest.raises(ValueError, match="of which only 3 are here"), plain_stack(model.blocks[1:]):
        pass
    assert hasattr(model.blocks[0].attn.qkv, "weight_lorst")


def test_file_imports_nothing_but_torch():
    """Beside the standard library and this folder."""
    found = set()
    for node in ast.walk(ast.parse(Path(stack.__file__).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    assert found <= {"torch", "collections", "contextlib", "fnmatch", "functools", "typing"}
