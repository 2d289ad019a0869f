"""configs/lors/other_detectors: LORST in detectors that are mmdet's own."""

import copy
from functools import cache

import pytest
import torch
from conftest import ROOT, data_samples
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.lors import fold_stack

MSDA = {"cross_attn.value_proj.weight", "cross_attn.output_proj.weight"}
MHA = {"self_attn.attn.in_proj_weight", "self_attn.attn.out_proj.weight"}
FFN = {"ffn.layers.0.0.weight", "ffn.layers.1.weight"}
DAB = {f"self_attn.{p}_proj.weight" for p in ("qcontent", "qpos", "kcontent", "kpos", "v", "out")}
DAB |= {f"cross_attn.{p}_proj.weight" for p in ("qcontent", "kcontent", "kpos", "qpos_sine", "v", "out")}

# type, (parameters, of the decoder, of the encoder) plain and with LORST, weights that the decoder's layers share
TABLE = {
    "deformable-detr-lors_r50_16xb2-50e_coco": (
        "DeformableDETR",
        (40_884_794, 6_123_264, 4_541_184),
        (37_280_314, 2_518_784, 4_541_184),
        MHA | MSDA | FFN,
    ),
    "dab-detr-lors_r50_8xb2-50e_coco": (
        "DABDETR",
        (43_721_810, 11_512_840, 8_022_022),
        (36_611_154, 4_402_184, 8_022_022),
        DAB | FFN,
    ),
    "dino-lors_r50_8xb2-12e_coco": (
        "DINO",
        (47_702_412, 9_472_768, 7_693_056),
        (41_869_708, 3_640_064, 7_693_056),
        MHA | MSDA | FFN,
    ),
    "dino-lors-encoder-decoder_r50_8xb2-12e_coco": (
        "DINO",
        (47_702_412, 9_472_768, 7_693_056),
        (37_052_812, 3_640_064, 2_876_160),
        MHA | MSDA | FFN,
    ),
    "dino-lors_r18_digits": (
        "DINO",
        (4_527_064, 2_397_280, 469_536),
        (3_347_416, 1_217_632, 469_536),
        MHA | MSDA | FFN,
    ),
}
PLAIN = {"dino_r18_digits"}
ZERO_QUERIES = {f"decoder.layers.0.self_attn.{p}content_proj.weight" for p in "qk"}
ZERO_QUERIES |= {"decoder.layers.0.self_attn.v_proj.weight"}
"""Private weights without a gradient: what DAB-DETR's first layer applies to its queries, which are zero there."""


def load(name: str) -> Config:
    """A config, without anything to download."""
    cfg = Config.fromfile(ROOT / f"configs/lors/other_detectors/{name}.py")
    plain = cfg.model.get("model", cfg.model)
    plain.backbone.init_cfg = None
    return cfg


@cache
def shrunk(name: str) -> Config:
    """The same detector with a small backbone, narrow FFNs and few queries."""
    cfg = load(name)
    model = cfg.model.model
    out_indices = model.backbone.out_indices
    model.backbone.update(depth=18, base_channels=8, frozen_stages=-1)
    model.neck.in_channels = [8 * 2**i for i in out_indices]
    for coder in (model.encoder, model.decoder):
        coder.layer_cfg.ffn_cfg.feedforward_channels = 64
    model.num_queries = 12
    model.test_cfg.max_per_img = 5
    return cfg


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def counts(model: nn.Module) -> tuple[int, int, int]:
    return count(model), count(model.decoder), count(model.encoder)


def test_the_table_has_every_config():
    assert {path.stem for path in (ROOT / "configs/lors/other_detectors").glob("*.py")} == set(TABLE) | PLAIN


@pytest.mark.parametrize("name", TABLE)
def test_parameters_before_and_after(name):
    kind, plain, lors, _ = TABLE[name]
    cfg = load(name)
    built = build_without_weights(cfg.model)
    assert type(built).__name__ == kind
    assert counts(build_without_weights(cfg.model.model)) == plain
    assert counts(built) == lors


@pytest.mark.parametrize("name", TABLE)
def test_every_layer_shares_what_the_table_says(name):
    built = build_without_weights(load(name).model)
    for i, layer in enumerate(built.decoder.layers):
        stacked = {n for n, _ in layer.named_parameters() if "_lorst.private.B" in n}
        assert {n.replace("_lorst.private.B", "") for n in stacked} == TABLE[name][3]
        assert any(n.endswith(".shared") for n, _ in layer.named_parameters()) == (i == 0)
        assert not any(n in dict(layer.named_parameters()) for n in TABLE[name][3])


@pytest.mark.parametrize("name", [*TABLE, *PLAIN])
def test_dumps_and_loads(name, tmp_path):
    load(name).dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py").to_dict() == load(name).to_dict()


@pytest.mark.parametrize("name", ["dino_r18_digits", "dino-lors_r18_digits"])
def test_building_leaves_the_config_as_it_was(name):
    """mmdet's DETRs write into theirs and then refuse it; the tools build twice, first to check."""
    cfg = load(name)
    build_without_weights(cfg.model)
    assert cfg.to_dict() == load(name).to_dict()


def test_the_digits_pair_differs_by_lors_alone():
    plain, lors = load("dino_r18_digits").to_dict(), load("dino-lors_r18_digits").to_dict()
    with_lors = lors.pop("model")
    assert with_lors["type"] == "WithLORS" and plain.pop("model") == with_lors["model"]
    assert plain == lors


def randomise_private(model: nn.Module) -> None:
    """B non-zero, so that layers differ and A has a gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith(".private.B"):
            nn.init.normal_(parameter, std=0.1)


def loss(model: nn.Module, images: torch.Tensor, samples: list) -> torch.Tensor:
    torch.manual_seed(7)
    losses = model(images, copy.deepcopy(samples), mode="loss")
    return sum(v for k, v in losses.items() if "loss" in k)


@pytest.mark.parametrize("name", TABLE)
def test_forward_and_backward_and_folding(name):
    model = MODELS.build(shrunk(name).model)
    model.init_weights()
    randomise_private(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    images, samples = torch.randn(2, 3, 96, 96), data_samples([3, 2], (96, 96), 10)
    before = loss(model, images, samples)
    before.backward()
    stacked = {n: p for n, p in model.named_parameters() if "_lorst." in n}
    still = {n.split("_lorst.")[0] for n, p in stacked.items() if p.grad is None or not p.grad.any()}
    assert still == (ZERO_QUERIES if TABLE[name][0] == "DABDETR" else set())
    fold_stack([model])
    assert not any("_lorst" in n for n, _ in model.named_parameters())
    assert loss(model, images, samples).item() == pytest.approx(before.item(), rel=1e-6)
    plain = MODELS.build(shrunk(name).model.model)
    assert [(k, v.shape) for k, v in plain.state_dict().items()] == [
        (k, v.shape) for k, v in model.state_dict().items()
    ]
    model.eval()
    with torch.no_grad():
        found = model(images, samples, mode="predict")
    assert all(len(sample.pred_instances) == shrunk(name).model.model.test_cfg.max_per_img for sample in found)
