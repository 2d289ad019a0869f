"""Every config of configs/classification builds and trains what its name and the LORS paper's appendix say."""

from functools import cache

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from rates import learning_rates
from torch import nn

import mmdet_lors.classification  # noqa: F401
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.lors.stacked_adaptive import AdaptiveResidual

PLAIN_DEIT, LORS_DEIT = (f"configs/classification/deit-tiny{lors}_cifar100.py" for lors in ("", "-lors"))
PLAIN_VIT, LORS_VIT = (f"configs/classification/vit{lors}_digits.py" for lors in ("", "-lors"))
TOKEN_VIT, MEAN_VIT = (f"configs/classification/vit-lors-adaptive{h}_digits.py" for h in ("", "-mean"))
LATE, EARLY = [1] * 9 + [2, 4, 6], [6, 4, 2] + [1] * 9


def appendix(name: str) -> str:
    return f"configs/classification/ablations/{name}.py"


def deit(encoder: int, attention: list[int] | None = None, ffn: list[int] | None = None, **changes) -> dict:
    """DeiT-Tiny on CIFAR-100: ``attention`` and ``ffn`` are K of LORST in each layer, None without LORST.

    ``encoder`` is the layers' number of parameters, ``condition`` what LORSA's h is, None without LORSA.
    """
    sizes = dict(data="CIFAR100", pixels=56, layers=12, dim=192, tokens=197, loaded=None, condition=None)
    return dict(sizes, rank=32, encoder=encoder, attention=attention, ffn=ffn) | changes


def vit(encoder: int, **changes) -> dict:
    """The digits' small transformer."""
    return deit(encoder, **dict(data="SklearnDigits", pixels=32, layers=6, dim=96, tokens=17, rank=8) | changes)


LORS_GROUPS = dict(attention=[1, 1, 1, 1, 2, 3], ffn=[3, 2, 1, 1, 1, 1])

CLASSIFIERS = {
    PLAIN_DEIT: deit(5_338_368),
    LORS_DEIT: deit(2_536_704, LATE, EARLY),
    PLAIN_VIT: vit(671_040),
    LORS_VIT: vit(228_672, **LORS_GROUPS),
    TOKEN_VIT: vit(214_308, **LORS_GROUPS, rank=3, condition="token"),
    MEAN_VIT: vit(214_308, **LORS_GROUPS, rank=3, condition="mean"),
    appendix("table9_lorst-attention"): deit(4_490_496, attention=LATE),
    appendix("table9_lorst-ffn"): deit(3_384_576, ffn=EARLY),
    appendix("table10_row-1_recurrent"): deit(472_320, [0] * 12, [0] * 12),
    appendix("table10_row-2_private-attention"): deit(914_688, [1] * 12, [0] * 12),
    appendix("table10_row-3_private-ffn"): deit(1_209_600, [0] * 12, [1] * 12),
    appendix("table10_row-4_one-group"): deit(1_651_968, [1] * 12, [1] * 12),
    appendix("table10_row-5_late-attention"): deit(1_983_744, LATE, [1] * 12),
    appendix("table10_row-6_early-ffn"): deit(2_204_928, [1] * 12, EARLY),
    appendix("table11_imagenet-attention"): deit(5_338_368, loaded=["norm1", "attn"]),
    appendix("table11_imagenet-ffn"): deit(5_338_368, loaded=["norm2", "mlp"]),
    appendix("table11_imagenet-both"): deit(5_338_368, loaded=["norm1", "attn", "norm2", "mlp"]),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_table_has_every_config():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "configs/classification").rglob("*.py")}
    assert files == set(CLASSIFIERS)


@cache
def classifier(name: str) -> tuple[Config, nn.Module]:
    """A classifier's config and, on the meta device, what it builds. Shared between tests: not to be changed."""
    cfg = Config.fromfile(ROOT / name)
    return cfg, build_without_weights(cfg.model)


def groups(linears: list[nn.Linear], rank: int) -> list[int] | None:
    """K of LORST in one Linear of each layer; None where they do not share."""
    if not hasattr(linears[0], "weight_lorst"):
        return None
    assert len({id(linear.weight_lorst.first) for linear in linears}) == 1
    assert all(linear.weight_lorst.rank % rank == 0 for linear in linears)
    return [linear.weight_lorst.rank // rank for linear in linears]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_build_what_the_table_says(name):
    expected = CLASSIFIERS[name]
    cfg, model = classifier(name)
    network, rank = model.network, expected["rank"]
    attention = [groups([getattr(b.attn, fc) for b in network.blocks], rank) for fc in ("qkv", "proj")]
    ffn = [groups([getattr(b.mlp, fc) for b in network.blocks], rank) for fc in ("fc1", "fc2")]
    assert attention[0] == attention[1] and ffn[0] == ffn[1]
    (condition,) = {m.condition for m in network.modules() if isinstance(m, AdaptiveResidual)} or {None}
    datasets = [cfg[f"{split}_dataloader"].dataset for split in ("train", "val", "test")]
    (data,), (pixels,) = {d.type for d in datasets}, {d.transform.input_size for d in datasets}
    assert dict(
        data=data,
        pixels=pixels,
        layers=len(network.blocks),
        dim=network.embed_dim,
        tokens=network.pos_embed.shape[1],
        loaded=model.init_cfg[2]["parts"] if len(model.init_cfg or ()) > 2 else None,
        rank=rank,
        encoder=count(network.blocks),
        attention=attention[0],
        ffn=ffn[0],
        condition=condition,
    ) == dict(expected)
    assert network.patch_embed.img_size == (pixels, pixels)
    assert network.num_classes == {"CIFAR100": 100, "SklearnDigits": 10}[data]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_dump_and_load(name, tmp_path):
    cfg, _ = classifier(name)
    cfg.dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py").to_dict() == cfg.to_dict()


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if CLASSIFIERS[name]["data"] == "CIFAR100"])
def test_classifiers_train_as_the_paper_says(name):
    """300 epochs of 8 x 128 images: up to 1e-3 in 20 epochs, then down to 1e-5; Mixup, CutMix and flips alone.

    The rest is the release's: CIFAR's mean and std, no drop path, how weights start.
    """
    cfg, model = classifier(name)
    assert cfg.train_cfg.max_epochs == 300 and cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
    rates = learning_rates(cfg.param_scheduler, cfg.optim_wrapper.optimizer.lr, 300)
    assert rates[0] < 1e-5 and rates[20] == max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)
    assert (model.mixup.mixup_alpha, model.mixup.cutmix_alpha, model.mixup.label_smoothing) == (0.8, 1.0, 0.1)
    transform = cfg.train_dataloader.dataset.transform
    assert (
        transform.color_jitter is None and transform.hflip == 0.5 and transform.scale == transform.ratio == (1.0, 1.0)
    )
    assert (model.mixup.mix_prob, model.mixup.switch_prob) == (1.0, 0.5)  # always one of the two
    preprocessor = (cfg.model.model if cfg.model.type == "WithLORS" else cfg.model).data_preprocessor
    assert preprocessor.mean == [129.304, 124.070, 112.434] and preprocessor.std == [68.170, 65.392, 70.418]
    assert all(isinstance(block.drop_path1, nn.Identity) for block in model.network.blocks)


@pytest.mark.parametrize("name", [PLAIN_DEIT, LORS_DEIT])
def test_classifiers_start_as_released(name):
    """Kaiming for the patch convolution and W_shared, a truncated normal for Linears, zero for biases."""
    torch.manual_seed(0)
    model = MODELS.build(classifier(name)[0].model)
    model.init_weights()
    network, lors = model.network, name == LORS_DEIT
    patches = network.patch_embed.proj
    assert patches.weight.std().item() == pytest.approx((3 * 4 * 4) ** -0.5, rel=0.05) and not patches.bias.any()
    fc1 = network.blocks[5].mlp.fc1
    expected = (3 * 192) ** -0.5 if lors else 0.02  # of a uniform distribution up to 192 ** -0.5
    assert fc1.weight.std().item() == pytest.approx(expected, rel=0.02) and not fc1.bias.any()
    assert network.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", [PLAIN_DEIT, LORS_DEIT])
def test_deit_decays_matrices_alone(name):
    cfg, model = classifier(name)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, p in model.named_parameters():
        matrix = p.dim() > 1 and not key.endswith(("cls_token", "pos_embed"))
        assert decay[id(p)] == (0.05 if matrix else 0.0), key


@pytest.mark.parametrize(
    ("plain", "lors"),
    [(PLAIN_DEIT, LORS_DEIT), (PLAIN_VIT, LORS_VIT), (PLAIN_VIT, TOKEN_VIT), (PLAIN_VIT, MEAN_VIT)],
)
def test_a_pair_of_classifiers_differs_by_lors_alone(plain, lors):
    plain, lors = (classifier(name)[0].to_dict() for name in (plain, lors))
    assert lors["model"].pop("type") == "WithLORS" and lors["model"].pop("stacks")
    assert lors.pop("model") == dict(model=plain.pop("model"))
    assert plain == lors
