"""configs/pela: every file builds what its name says, compressed as the paper has it."""

import re
import warnings
from functools import cache

import pytest
import timm
import torch
from conftest import ROOT, data_samples
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from rates import learning_rates
from timm.data import create_transform
from torch import nn

from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.pela import LowRankLinear

DISTILLERS = {
    # timm's name, parameters before, after, ratio, low-rank layers
    "pela-distiller_deit-base_imagenet": ("deit_base_patch16_224", 86_567_656, 44_081_896, 2, 48),
    "pela-distiller_swin-base_imagenet": ("swin_base_patch4_window7_224", 87_768_224, 62_164_128, 1.5, 72),
    "pela-distiller_deit3-large_imagenet": ("deit3_large_patch16_224", 304_374_760, 153_232_360, 2, 96),
}
RELEASED = {
    "deit-base": dict(
        epochs=50, images=64, lr=6.25e-5, lowest=1e-5, warm_up=(1, 1e-6), decay=0.05, drop_path=0.1, clip=None,
        erasing=0.25, repeated=True, jitter=0.3, losses=(1.0, None), ema=0.99996, crop=0.875,
    ),
    "deit3-large": dict(
        epochs=20, images=16, lr=3.125e-5, lowest=1e-5, warm_up=(1, 1e-6), decay=0.1, drop_path=0.45, clip=None,
        erasing=None, repeated=False, jitter=0.3, losses=(1.0, None), ema=0.99996, crop=1.0,
    ),
    "swin-base": dict(
        epochs=50, images=64, lr=1.25e-5, lowest=5e-9, warm_up=(3, 5e-8), decay=0.05, drop_path=0.5, clip=5.0,
        erasing=0.25, repeated=False, jitter=0.4, losses=(1.0, 1.0), ema=None, crop=0.875,
    ),
}  # fmt: skip
"""What the authors' code has for intermediate pre-training; the perturbation's eps is 0."""
TABLE_7 = {
    # whether the feature and the perturbation loss are there
    "table7_deit-base_neither": (False, False),
    "table7_deit-base_perturbation": (False, True),
    "table7_deit-base_both": (True, True),
    "table7_swin-base_neither": (False, False),
    "table7_swin-base_feature": (True, False),
    "table7_swin-base_perturbation": (False, True),
}
DETECTORS = {
    # parameters, and of the backbone, before; after; low-rank layers
    "cascade-mask-rcnn_pela-swin-base-ratio-2_crop-ms-480-800-3x_coco": (
        (144_977_002, 86_745_016),
        (103_010_922, 44_778_936),
        96,
    ),
    "cascade-mask-rcnn_pela-swin-base_crop-ms-480-800-3x_coco": (
        (144_977_002, 86_745_016),
        (119_372_906, 61_140_920),
        72,
    ),
    "adamixer-lors_pela-swin-s_300-queries_crop-ms-480-800-3x_coco": (
        (84_633_842, 48_838_602),
        (70_172_018, 34_376_778),
        72,
    ),
    "adamixer-lors_pela-deit-base_300-queries_crop-ms-480-800-3x_coco": (
        (124_421_864, 88_454_592),
        (81_936_104, 45_968_832),
        48,
    ),
    "adamixer-lors_pela-swin_digits": ((1_174_524, 505_702), (1_034_812, 365_990), 12),
}
DIGITS = {"pela-distiller_vit_digits", "pela_vit_digits"}
SEGMENTORS = {
    f"upernet_pela-{name}_8xb2-160k_ade20k-512x512"
    for name in ("deit-base", "deit3-large", "swin-base", "swin-base-ratio-2")
}
"""In tests/pela/test_segmentation.py: they need mmsegmentation."""


@cache
def load(name: str) -> Config:
    """A config. Shared between tests: not to be changed."""
    folder = "pela/ablations" if name in TABLE_7 else "pela"
    return Config.fromfile(ROOT / f"configs/{folder}/{name}.py")


@cache
def build(name: str) -> nn.Module:
    """Its model on the meta device; any warning is an error, such as one of an omitted name that is not there."""
    cfg = load(name)  # mmengine warns here of pkg_resources
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return build_without_weights(cfg.model)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def low_rank(model: nn.Module) -> list[LowRankLinear]:
    return [m for m in model.modules() if isinstance(m, LowRankLinear)]


def test_every_config_is_here():
    files = {path.stem for path in (ROOT / "configs/pela").rglob("*.py")}
    assert files == {*DISTILLERS, *TABLE_7, *DETECTORS, *DIGITS, *SEGMENTORS}


@pytest.mark.parametrize("name", [*DISTILLERS, *TABLE_7, *DETECTORS, *sorted(DIGITS)])
def test_dumps_and_loads(name, tmp_path):
    load(name).dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py").to_dict() == load(name).to_dict()


@pytest.mark.parametrize("name", DISTILLERS)
def test_distillers(name):
    model_name, before, after, ratio, layers = DISTILLERS[name]
    cfg, model = load(name).model, build(name)
    assert cfg.teacher.network.model_name == model_name and count(model) == after
    assert cfg.teacher_checkpoint.removeprefix("timm://").split(".")[0] == model_name
    with torch.device("meta"):
        assert count(timm.create_model(model_name)) == before
    assert cfg.ratio == ratio and len(low_rank(model)) == layers
    normalise = timm.get_pretrained_cfg(cfg.teacher_checkpoint.removeprefix("timm://"))
    assert cfg.teacher.data_preprocessor.mean == [pytest.approx(255 * m) for m in normalise.mean]


@pytest.mark.parametrize("model", RELEASED)
def test_distillers_train_as_released(model):
    expected, name = RELEASED[model], f"pela-distiller_{model}_imagenet"
    cfg, built = load(name), build(name)
    student, warm_up = built.student, expected["warm_up"]
    assert cfg.train_cfg.max_epochs == expected["epochs"] and cfg.train_dataloader.batch_size == expected["images"]
    assert cfg.auto_scale_lr.base_batch_size == 4 * expected["images"]
    rates = learning_rates(cfg.param_scheduler, cfg.optim_wrapper.optimizer.lr, expected["epochs"], 100)
    assert rates[0] == pytest.approx(warm_up[1]) and rates[-1] == pytest.approx(expected["lowest"], rel=1e-3)
    assert rates[100 * warm_up[0]] == max(rates) == pytest.approx(expected["lr"])
    optimizer = build_optim_wrapper(built, cfg.optim_wrapper).optimizer
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, p in built.named_parameters():
        free = p.dim() == 1 or key.endswith(("cls_token", "pos_embed", "relative_position_bias_table"))
        assert decay[id(p)] == (0 if free else expected["decay"]), key
    blocks = [m for key, m in student.network.named_modules() if re.fullmatch(r"(.+\.)?blocks\.\d+", key)]
    assert blocks[-1].drop_path1.drop_prob == pytest.approx(expected["drop_path"])
    assert (cfg.optim_wrapper.get("clip_grad") or {}).get("max_norm") == expected["clip"]
    transform = cfg.train_dataloader.dataset.transform
    assert transform.color_jitter == expected["jitter"]
    steps = str(create_transform(**transform))
    assert "RandAugment(n=2" in steps and "interpolation=bicubic" in steps and "ColorJitter" not in steps
    assert (student.erase and student.erase.probability) == expected["erasing"]
    assert (cfg.train_dataloader.sampler.type == "RepeatedAugmentation") == expected["repeated"]
    mixup = student.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.switch_prob, mixup.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    losses = (built.feature_loss, built.perturbation_loss)
    assert tuple(loss and loss.loss_weight for loss in losses) == expected["losses"]
    assert losses[1] is None or losses[1].eps == 0
    average = cfg.default_hooks.get("average")
    assert (average and 1 - average.momentum) == (expected["ema"] and pytest.approx(expected["ema"]))
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.transform.crop_pct == expected["crop"]


@pytest.mark.parametrize("name", TABLE_7)
def test_table_7(name):
    model = build(name)
    assert tuple(loss is not None for loss in (model.feature_loss, model.perturbation_loss)) == TABLE_7[name]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name):
    before, after, layers = DETECTORS[name]
    model = build(name)
    assert (count(model), count(model.backbone)) == after and len(low_rank(model)) == layers
    assert len(low_rank(model.backbone)) == layers
    cfg = load(name).model
    plain = build_without_weights(dict(cfg, backbone=cfg.backbone.backbone))
    assert (count(plain), count(plain.backbone)) == before and not low_rank(plain)


def test_table_3_is_the_papers():
    assert round(DETECTORS["cascade-mask-rcnn_pela-swin-base_crop-ms-480-800-3x_coco"][0][0] / 1e6, 1) == 145.0
    assert round(DETECTORS["cascade-mask-rcnn_pela-swin-base-ratio-2_crop-ms-480-800-3x_coco"][1][0] / 1e6, 1) == 103.0


@pytest.mark.parametrize("name", [n for n in DETECTORS if n.endswith("coco")])
def test_the_factors_are_trained(name):
    """Among the optimizer's parameters, with weight decay; norms, positions and biases of attention have none."""
    model = build(name)
    optimizer = build_optim_wrapper(model, load(name).optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    full = max(decay.values())
    assert full > 0 and all(decay[id(f)] == full for layer in low_rank(model) for f in (layer.U, layer.V))
    for key, p in model.backbone.named_parameters():
        if "norm" in key or key.endswith(("relative_position_bias_table", "pos_embed", "cls_token")):
            assert decay[id(p)] == 0, key


def test_the_swin_s_pair_differs_by_pela_alone():
    name = "adamixer-lors_pela-swin-s_300-queries_crop-ms-480-800-3x_coco"
    ours = load(name).to_dict()
    plain = Config.fromfile(ROOT / f"configs/lors/{name.replace('pela-', '')}.py").to_dict()
    compressed, whole = ours["model"].pop("backbone"), plain["model"].pop("backbone")
    assert ours == plain and compressed["backbone"] == whole


def test_digits_configs_are_the_plain_classifiers():
    plain = Config.fromfile(ROOT / "configs/classification/vit_digits.py")
    distiller, alone = (load(name) for name in ("pela-distiller_vit_digits", "pela_vit_digits"))
    assert distiller.model.teacher == alone.model.model == plain.model
    assert distiller.model.teacher_checkpoint == f"work_dirs/vit_digits/epoch_{plain.train_cfg.max_epochs}.pth"
    student, other = build("pela-distiller_vit_digits").student, build("pela_vit_digits")
    assert {k: v.shape for k, v in student.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}


def test_the_digits_detector_trains():
    model = MODELS.build(load("adamixer-lors_pela-swin_digits").model)
    model.init_weights()
    losses = model.loss(torch.randn(2, 3, 96, 96), data_samples([2, 1], (96, 96), 10))
    sum(value for key, value in losses.items() if "loss" in key).backward()
    assert all(layer.U.grad.any() and layer.V.grad.any() for layer in low_rank(model))
