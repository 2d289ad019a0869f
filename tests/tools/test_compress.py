"""compress.py from a config and a checkpoint to a smaller one that every other tool takes."""

import json

import pytest
import torch
from conftest import LORS_DIGITS, ROOT, refused, write_random_lors
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdet_lors.analysis.arguments import quantity
from mmdet_lors.inference import Inferencer
from mmdet_lors.pela import LowRankConv2d

TOOL = "model_converters/compress.py"
VIT = "configs/classification/vit_digits.py"


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def classifier(tmp_path) -> str:
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(ROOT / VIT).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "plain.pth")
    return str(tmp_path / "plain.pth")


def built(out) -> nn.Module:
    model = MODELS.build(Config.fromfile(out.with_suffix(".py")).model)
    model.load_state_dict(torch.load(out)["state_dict"])
    return model


@pytest.mark.parametrize(
    ("how", "most"), [(["--ratio", "4"], 181_354), (["--params", "40%"], 272_068), (["--params", "0.2M"], 200_000)]
)
@pytest.mark.parametrize("images", ["0", "16"])
def test_a_classifier_of_the_size_that_was_asked_for(how, most, images, classifier, tmp_path, call_tool, capsys):
    out = tmp_path / "small.pth"
    call_tool(TOOL, VIT, classifier, out, *how, "--images", images)
    model = built(out)
    assert 0.97 * most < size(model) <= most
    said = capsys.readouterr().out
    assert f"680,170 parameters -> {size(model):,}" in said and "| network.blocks.0.attn.qkv | 96 | 288 |" in said
    assert ("share of the error at rank 0" in said) == (how[0] == "--params")
    metrics = tmp_path / "metrics.json"
    call_tool("test.py", out.with_suffix(".py"), out, "--metrics", metrics, "--work-dir", tmp_path / "work")
    assert "accuracy/top1" in json.loads(metrics.read_text())


def test_multiply_adds_of_the_whole_model(classifier, tmp_path, call_tool, capsys):
    out = tmp_path / "small.pth"
    call_tool(TOOL, VIT, classifier, out, "--flops", "50%", "--images", "16")
    assert "0.011 G multiply-adds an image, 99% of them" in capsys.readouterr().out  # 663,552 weights for 17 tokens
    model, plain = built(out), MODELS.build(Config.fromfile(ROOT / VIT).model)

    found = []
    for side in (model, plain):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            side.eval().network(torch.randn(1, 1, 32, 32))
        found.append(counter.get_total_flops())
    assert 0.48 < found[0] / found[1] <= 0.5


def test_a_detector_and_the_tools_that_take_it(tmp_path, call_tool, tiny_digits):
    data = [f"{split}_dataloader.dataset.data_root={tiny_digits}/" for split in ("train", "val", "test")]
    cfg = Config.fromfile(ROOT / LORS_DIGITS)
    cfg.merge_from_dict(dict(option.split("=") for option in data))
    cfg.dump(tmp_path / "config.py")
    checkpoint, out = write_random_lors(tmp_path), tmp_path / "small.pth"
    omit = ["norm", "out_proj", "sampling", "cls_branch", "reg_branch"]
    call_tool(TOOL, tmp_path / "config.py", checkpoint, out, "--params", "70%", "--convolutions", "--images", "8",
              "--omit", *omit)  # fmt: skip
    model = built(out)
    assert size(model) <= 0.7 * size(MODELS.build(cfg.model)) and type(model).__name__ == "QueryBased"
    assert isinstance(model.backbone.layer3[1].conv2, LowRankConv2d)
    assert type(model.decoder.stages[0].cls_branch[0]) is nn.Linear
    inferencer = Inferencer(out.with_suffix(".py"), out, device="cpu", show_progress=False)
    picture = str(next((tiny_digits / "val").iterdir()))
    assert len(next(iter(inferencer.stream(picture)))[1].pred_instances) > 0

    folded = tmp_path / "folded.pth"
    call_tool("deployment/fold_lors.py", out.with_suffix(".py"), out, folded)
    plain = built(folded)
    assert plain.decoder.lorst is None and isinstance(plain.backbone.layer3[1].conv2, LowRankConv2d)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for found, expected in zip(plain.eval()._forward(images), model.eval()._forward(images), strict=True):
            assert torch.allclose(found.cls_score, expected.cls_score, atol=1e-4)
    # It compares the file's predictions with PyTorch's itself.
    call_tool("deployment/export_onnx.py", out.with_suffix(".py"), out, tmp_path / "small.onnx", "--size", "96x96")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "20k"], "20,000 parameters are below the 25,834 that rank 1 everywhere needs"),
        (["--params", "1M"], "1,000,000 parameters are above the 680,170 of the model"),
        (["--params", "half"], "--params 'half' must be a number, such as 30M, 900k or 60%"),
        (["--flops", "1%", "--images", "8"], "multiply-adds are below the 156,672 that rank 1 everywhere needs"),
        (["--flops", "50%", "--images", "0"], "--flops needs --images"),
        (["--ratio", "1000"], "ratio 1000.0 leaves network.blocks.0.attn.qkv"),
        (["--ratio", "2", "--images", "-1"], "--images must be 0 or more, got -1"),
        (["--ratio", "2", "--omit", ""], "omit leaves no Linear to compress"),
    ],
)
def test_refuses(arguments, message, classifier, tmp_path, monkeypatch, capsys):
    out = tmp_path / "small.pth"
    assert message in refused(TOOL, [str(ROOT / VIT), classifier, str(out), *arguments], monkeypatch, capsys)
    assert not out.exists() and not out.with_suffix(".py").exists()


def test_refuses_where_it_would_write(classifier, tmp_path, monkeypatch, capsys):
    for out, message in (("x.onnx", "must end with .pth"), ("no/x.pth", "must be a file in a folder that exists")):
        arguments = [str(ROOT / VIT), classifier, str(tmp_path / out), "--ratio", "2"]
        assert message in refused(TOOL, arguments, monkeypatch, capsys)
    assert quantity("--params", "1.5k", 7) == 1500
