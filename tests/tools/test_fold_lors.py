"""Folding a checkpoint: what is written works as a plain AdaMixer, and what cannot be folded is refused."""

import sys

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, load_config, load_tool, random_lors
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_lors.engine.checkpoint.reading import check_fit, read_checkpoint
from mmdet_lors.errors import UserError

TOOL = "deployment/fold_lors.py"
ADAPTIVE = "configs/classification/vit-lors-adaptive_digits.py"


def fold(monkeypatch, root, *arguments):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["fold_lors.py", *map(str, arguments)])
    load_tool(TOOL).main()


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of LORS on the digits, and its model."""
    model = random_lors(load_config(LORS_DIGITS).model)
    path = tmp_path / "lors.pth"
    torch.save(dict(meta=dict(dataset_meta=dict(classes=("0",))), state_dict=model.state_dict()), path)
    return path, model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_folded_checkpoint_and_config_work(dtype, trained, tmp_path, monkeypatch, root, capsys):
    checkpoint, model = trained
    out = tmp_path / "plain.pth"
    fold(monkeypatch, root, LORS_DIGITS, checkpoint, out, "--dtype", dtype)
    assert capsys.readouterr().out.strip().endswith(f"wrote {out} and {tmp_path / 'plain.py'}")
    written, cfg = read_checkpoint(out), Config.fromfile(tmp_path / "plain.py")
    assert cfg.model.decoder.lors is None and cfg.model.decoder.stage.in_points == 16
    assert written["meta"]["dataset_meta"] == dict(classes=("0",))
    assert written["state_dict"]["decoder.stages.0.mixing.out_proj.weight"].dtype == getattr(torch, dtype)
    cfg.model.backbone.init_cfg = None
    plain = MODELS.build(cfg.model).eval()
    check_fit(plain, written, out)
    plain.load_state_dict(written["state_dict"])
    images = torch.randn(2, 3, 64, 96)
    tolerance = dict(rtol=0.1, atol=3) if dtype == "bfloat16" else dict(rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        for ours, expected in zip(plain._forward(images), model._forward(images), strict=True):
            assert torch.allclose(ours.bboxes, expected.bboxes, **tolerance)


def test_a_value_too_large_for_the_data_type_is_refused(trained, tmp_path, monkeypatch, root):
    checkpoint, model = trained
    weights = model.state_dict()
    weights["decoder.lorst.shared"][0, 0] = 1e6
    torch.save(dict(state_dict=weights), checkpoint)
    with pytest.raises(UserError, match=r"mixing.out_proj.weight does not fit into float16: some values overflow"):
        fold(monkeypatch, root, LORS_DIGITS, checkpoint, tmp_path / "half.pth", "--dtype", "float16")
    assert [p.name for p in tmp_path.iterdir()] == ["lors.pth"]


@pytest.mark.parametrize(
    ("config", "out", "message"),
    [
        (PLAIN_DIGITS, "plain.pth", r"model.decoder.lors is not set: there is nothing to fold"),
        (
            ADAPTIVE,
            "plain.pth",
            r"vit-lors-adaptive_digits.py: no LoRA, and model.decoder.lors is not set: there is nothing to fold",
        ),
        (LORS_DIGITS, "none/plain.pth", r"OUT .*: must be a file in a folder that exists"),
        (LORS_DIGITS, "plain.py", r"OUT .*: must be a checkpoint file, not .py"),
        ("configs/lors/adamixer-lors_r50_100-queries_1x_coco.py", "plain.pth", r"of another architecture"),
    ],
)
def test_refuses_and_leaves_nothing_behind(config, out, message, trained, tmp_path, monkeypatch, root):
    with pytest.raises(UserError, match=message):
        fold(monkeypatch, root, config, trained[0], tmp_path / out)
    assert [p.name for p in tmp_path.iterdir()] == ["lors.pth"]
