"""Counts against values computed by hand and the papers' anchors; the report's options."""

import json
import sys

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, load_config, load_tool
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from torch import nn

from mmdet_lors.adamixer.stage import QuerySelfAttention
from mmdet_lors.analysis.complexity import OperationCounter, Report, component, measure
from mmdet_lors.conversion.folding import folded_config
from mmdet_lors.errors import UserError
from mmdet_lors.lors import share_stack

TOOL = "analysis_tools/model_report.py"
PLAIN, LORS = "adamixer/adamixer_r50_{}-queries_1x_coco", "lors/adamixer-lors_r50_{}-queries_1x_coco"


def parameters(config: str) -> Report:
    return measure(load_config(f"configs/{config}.py").model, None)


def operations(module: nn.Module, *inputs: torch.Tensor) -> OperationCounter:
    with OperationCounter(module.to("meta").eval()).named() as counter:
        module(*(x.to("meta") for x in inputs))
    return counter


def run_tool(monkeypatch, root, *arguments):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["model_report.py", *map(str, arguments)])
    load_tool(TOOL).main()


def test_layers_by_hand():
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    counter = operations(layers, torch.zeros(1, 3, 4, 4))
    assert counter.products == {"0": 8 * 16 * 3 * 9, "4": 128 * 10}
    assert {k: v for k, v in counter.elements.items() if v} == {"1": 2 * 128, "2": 128}


def test_attention_by_hand():
    """Three projections and one back, d x d each; N x N logits and N x N weights, d products each."""
    counter = operations(QuerySelfAttention(16, 2), torch.zeros(1, 5, 16), torch.zeros(1, 5, 4))
    assert counter.products == {"": 4 * 5 * 16 * 16 + 2 * 5 * 5 * 16}


@pytest.mark.parametrize(("condition", "cores"), [("token", 2 * 15), ("mean", 2)])
def test_adaptive_weights_by_hand(condition, cores):
    """W_shared, A and B, K cores of r x r from h = 6 channels, and E times A x; a sum, and for 'mean' the mean."""
    layers = nn.ModuleList(nn.Linear(6, 7) for _ in range(2))
    share_stack(layers, "weight", rank=3, groups=2, kind="adaptive", condition=condition)
    counter = operations(layers[0], torch.zeros(2, 3, 5, 6))
    tokens, private = 2 * 15, "weight_lorst.private"
    assert counter.products == {
        "": tokens * 6 * 7,
        private: tokens * (6 * 6 + 2 * 3 * 3 + 6 * 7),
        f"{private}.E": cores * 6 * 2 * 3 * 3,
    }
    mean = tokens * 6 if condition == "mean" else 0
    assert {k: v for k, v in counter.elements.items() if v} == {"": tokens * 7} | ({private: mean} if mean else {})


def test_adaptive_weights_in_a_detector():
    """20 queries pass the FFNs of 3 stages, 64 -> 256 -> 64, with K = 1 and r = 2."""
    plain = load_config(LORS_DIGITS).model
    stack = dict(layers="decoder.stages", targets="ffn.*", rank=2, kind="adaptive")
    model = dict(type="WithLORS", model=plain, stacks=[stack])
    before, found = (measure(cfg, (64, 64)).components["FFN"] for cfg in (plain, model))
    per_query = 2 * (64 + 256) * 2 + (64 + 256) * 4 + 2 * 4
    assert found.products - before.products == 3 * 20 * per_query
    assert before.parameters - found.parameters == 2 * 2 * 64 * 256 - 3 * (per_query - 2 * 4 + 2 * 4)
    assert folded_config(model) is None


def test_deformable_convolutions_by_hand():
    """9 positions of 4 channels are sampled for each of 36 outputs, with 4 multiply-adds each, 1 more for the mask."""
    x = torch.zeros(1, 4, 6, 6)
    counter = operations(DeformConv2dPack(4, 8, 3, padding=1), x)
    assert counter.products == {"conv_offset": 4 * 9 * 18 * 36, "": 8 * 9 * 4 * 36}
    assert counter.elements[""] == 4 * 36 * 9 * 4
    counter = operations(ModulatedDeformConv2dPack(4, 8, 3, padding=1), x)
    assert counter.products == {"conv_offset": 4 * 9 * 27 * 36, "": 8 * 9 * 4 * 36}
    assert counter.elements[""] == 5 * 36 * 9 * 4 + 9 * 36


def small_model(lors: dict | None = None) -> dict:
    """20 queries of 64; 3 stages; 2 groups of 16 points and 32 channels, 32 points out; FFN 256; 10 classes."""
    model = load_config(PLAIN_DIGITS).model
    model.backbone.update(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 1, 2), base_channels=32)
    model.neck.update(in_channels=[32, 64, 128], out_channels=64)
    model.query_generator.update(num_queries=20, content_dim=64)
    model.decoder.update(num_stages=3, num_classes=10, featmap_strides=[4, 8, 16], lors=lors)
    sizes = dict(content_dim=64, feat_channels=64, num_heads=4, ffn_channels=256)
    model.decoder.stage.update(**sizes, num_groups=2, in_points=16, out_points=32)
    return model


COMMON = {
    "attention": 3 * (20 * 4 * 64 * 64 + 2 * 20 * 20 * 64),
    "offsets": 3 * 20 * 64 * 2 * 16 * 3,
    "mixing (ACM, ASM)": 3 * 20 * 2 * (16 * 32 * 32 + 32 * 16 * 32),
    "FFN": 3 * 20 * 2 * 64 * 256,
    "heads": 3 * 20 * (2 * 64 * 64 + 64 * 10 + 64 * 4),
}
"""Products of the small model's decoder, without what LORS replaces."""


def decoder_products(model: dict) -> dict[str, int]:
    return {label: cost.products for label, cost in measure(model, (256, 256)).components.items() if cost.products}


def test_plain_decoder_by_hand():
    generators, projections = 3 * 20 * 64 * 2 * (32 * 32 + 32 * 16), 3 * 20 * 2 * 32 * 32 * 64
    expected = COMMON | {"own generators": generators, "own output projections": projections}
    assert decoder_products(small_model()) == expected


def test_lors_decoder_by_hand():
    """K = 1, 1, 2 groups of rank 8: cores E from the query, E A, and B (E A), for M and S of two sampling groups."""
    cores, EA, BEA = 64 * 2 * 8 * 8, 8 * 8 * 32 + 8 * 8 * 16, 32 * 8 * 32 + 32 * 8 * 16
    expected = COMMON | {
        "LORSA shared": 3 * 20 * 64 * 2 * (32 * 32 + 32 * 16),
        "LORSA private": (1 + 1 + 2) * 20 * 2 * (cores + EA + BEA),
        "LORST shared": 3 * 20 * 2048 * 64,
        "LORST private": 3 * 20 * (2048 * 8 + 8 * 64),
    }
    lors = dict(adaptive=dict(rank=8, groups=[1, 1, 2]), static=dict(rank=8, groups=1))
    assert decoder_products(small_model(lors)) == expected


def test_elements_by_hand():
    """Norms count 2 per element; ACM and ASM are a norm and a ReLU each, then the query is added.

    A sampled value takes 4 per level, 1 for the level's weight and 1 for the sum; the points take some more.
    """
    components = measure(small_model(), (256, 256)).components
    assert components["norms"].elements == 3 * 3 * 2 * 20 * 64
    assert components["mixing (ACM, ASM)"].elements == 3 * 20 * (2 * (16 * 32 + 32 * 32) * 3 + 64)
    assert components["heads"].elements == 3 * 20 * 2 * 64 * 3
    sampled = 3 * 20 * 2 * 16 * 32 * 3 * (4 + 1 + 1)
    assert sampled < components["3D sampling"].elements < 1.1 * sampled
    assert components["own generators"].elements == 0


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lorsa.shared.bias", "LORSA shared"),
        ("lorsa.private.3.B.0", "LORSA private"),
        ("lorsa", "LORSA private"),
        ("lorst.shared", "LORST shared"),
        ("lorst.bias.2", "LORST private"),
        ("stages.11.mixing.norm.weight", "norms"),
        ("stages.0.mixing.parameter_generator", "own generators"),
        ("stages.0.sampling.offset.weight", "offsets"),
        ("stages.0.attention.tau", "attention"),
        ("stages.0.reg_branch.3.weight", "heads"),
        ("stages.0", "refinement"),
    ],
)
def test_components_by_name(name, label):
    assert component(name) == label


@pytest.mark.parametrize(
    ("config", "total", "decoder", "queries"),
    [
        (PLAIN.format(100), 134_790_904, 110_272_296, 26_000),
        (PLAIN.format(300), 134_842_904, 110_272_296, 78_000),
        ("adamixer/adamixer_r101_300-queries_crop-ms-480-800-3x_coco", 153_835_032, 110_272_296, 78_000),
        (LORS.format(100), 59_866_872, 35_348_264, 26_000),
    ],
)
def test_parameters_are_the_anchors(config, total, decoder, queries):
    report = parameters(config)
    assert report.reference_parameters == total and report.decoder.parameters == decoder
    assert report.parts["queries"].parameters == queries - 4 * report.num_queries
    assert report.parts["neck"].parameters == 984_576
    assert report.parts["backbone"].parameters == (42_500_160 if "r101" in config else 23_508_032)


def test_parameters_inside_the_lors_decoder_are_the_anchors():
    found = {k: c.parameters for k, c in parameters(LORS.format(100)).components.items()}
    assert found.pop("LORSA shared") == 12_632_064
    assert found.pop("LORSA private") == 3_330_048
    assert found.pop("LORST shared") == 8_388_608
    assert found.pop("LORST private") == 1_586_688
    assert sum(found.values()) == 9_410_856


def test_frozen_weights_are_not_trainable():
    """Stem and first stage of the ResNet: 7 x 7 x 3 x 64, its norm, and the 215,808 of layer1."""
    report = parameters(PLAIN.format(100))
    assert report.total.parameters - report.total.trainable == 7 * 7 * 3 * 64 + 2 * 64 + 215_808


def test_folded_costs_what_a_plain_decoder_of_the_same_points_does():
    cfg = load_config(f"configs/{LORS.format(100)}.py")
    plain = load_config(f"configs/{PLAIN.format(100)}.py")
    plain.model.decoder.stage.update(num_groups=2, in_points=64)
    assert measure(folded_config(cfg.model)) == measure(plain.model)
    assert folded_config(plain.model) is None
    assert cfg.model.decoder.lors is not None


def test_json_and_table(tmp_path, monkeypatch, root, capsys):
    run_tool(monkeypatch, root, LORS_DIGITS, PLAIN_DIGITS, "--input", "320x256", "--json", tmp_path / "counts.json")
    found = json.loads((tmp_path / "counts.json").read_text())
    assert list(found) == [LORS_DIGITS, PLAIN_DIGITS]
    lors, plain = found.values()
    report = measure(load_config(LORS_DIGITS).model, (320, 256))
    assert lors["decoder"] == report.decoder.as_dict() and lors["input"] == "320x256"
    assert lors["folded"]["decoder"] == plain["decoder"] and plain["folded"] is None
    assert lors["total"]["multiply_adds"] == lors["total"]["products"] + lors["total"]["elements"]
    assert sum(c["parameters"] for c in lors["components"].values()) == lors["decoder"]["parameters"]
    assert "LORSA private" in capsys.readouterr().out


def test_input_is_padded_as_the_detector_pads():
    model = load_config(PLAIN_DIGITS).model
    assert measure(model, (250, 230)).total == measure(model, (256, 256)).total


def test_total_is_the_sum_of_its_parts():
    report = measure(load_config(PLAIN_DIGITS).model, None)
    assert isinstance(report, Report) and report.total.multiply_adds == 0
    assert report.total.parameters == sum(c.parameters for c in (*report.parts.values(), *report.components.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.py",), "config none.py does not exist"),
        ((), "give at least one CONFIG, or --paper"),
        ((PLAIN_DIGITS, "--input", "1280"), "--input '1280' must be WIDTHxHEIGHT in pixels, both 32 or more"),
        ((PLAIN_DIGITS, "--input", "31x800"), "--input '31x800' must be"),
        ((PLAIN_DIGITS, "--json", "none/x.json"), "--json none/x.json: folder none does not exist"),
        (("configs/_base_/default_runtime.py",), "has no model"),
    ],
)
def test_refuses(arguments, message, monkeypatch, root):
    with pytest.raises(UserError, match=message):
        run_tool(monkeypatch, root, *arguments)


def test_refuses_other_models():
    with pytest.raises(UserError, match="model.type 'ResNet' cannot be counted"):
        measure(dict(type="ResNet", depth=18))
