"""The boxes and classes that are drawn are those that a model is trained on."""

import json
from pathlib import Path

import mmcv
import numpy as np
import pytest
from conftest import LORS_DIGITS, ROOT, is_picture, load_config, load_tool, refused
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config

TOOL = "analysis_tools/browse_dataset.py"
VIT = "configs/classification/vit-lors_digits.py"


def test_boxes_shown_are_those_after_augmentation(tiny_digits, monkeypatch):
    browse = load_tool(TOOL)
    cfg = load_config(LORS_DIGITS)
    cfg.train_dataloader.dataset.data_root = str(tiny_digits)
    cfg.train_dataloader.dataset.pipeline.insert(3, dict(type="RandomFlip", prob=1.0))
    drawn, add = [], DetLocalVisualizer.add_datasample
    monkeypatch.setattr(DetLocalVisualizer, "add_datasample", lambda *a, **k: (drawn.append(a[2:4]), add(*a, **k)))
    found = list(browse.pictures(cfg, browse.build_dataset(cfg, "train"), start=2, number=3, seed=0))
    annotations = json.loads((tiny_digits / "annotations/train.json").read_text())
    for image, picture, (pixels, sample) in zip(annotations["images"][2:], found, drawn, strict=False):
        boxes = [a["bbox"] for a in annotations["annotations"] if a["image_id"] == image["id"]]
        assert picture.num_labels == len(boxes) and Path(image["file_name"]).stem in picture.name
        # 96 pixels, mirrored, then enlarged twice for the label's sake.
        x, y, w, h = np.array(boxes).reshape(-1, 4).T
        expected = 2 * np.stack([96 - x - w, y, 96 - x, y + h], axis=1)
        np.testing.assert_allclose(sample.gt_instances.bboxes.numpy(), expected, atol=1e-3)
        mirrored = mmcv.imread(str(tiny_digits / "train" / image["file_name"]), channel_order="rgb")[:, ::-1]
        assert np.array_equal(pixels, mmcv.imrescale(mirrored, 2)) and picture.image.shape == (192, 192, 3)
        assert np.array_equal(picture.image, pixels) == (not boxes)


def test_classes_are_browsed_too(tmp_path, call_tool, capsys):
    call_tool(TOOL, VIT, "--split", "val", "--number", 3, "--start", 10, "--out", tmp_path / "sheet.png")
    assert is_picture(tmp_path / "sheet.png") and "355 images" in capsys.readouterr().out
    call_tool(TOOL, VIT, "--number", 2, "--out", tmp_path / "folder")
    assert [path.name for path in sorted((tmp_path / "folder").iterdir())] == ["000000_0.png", "000001_1.png"]
    browse = load_tool(TOOL)
    cfg = Config.fromfile(ROOT / VIT)
    dataset = browse.build_dataset(cfg, "val")
    first = next(browse.pictures(cfg, dataset, start=10, number=1, seed=0))
    assert first.title == f"10: {str(dataset.source[10][1])!r}" and first.image.shape == (32, 32, 3)
    assert [ax.get_title() for ax in browse.contact_sheet([first] * 5).axes][:6] == [first.title] * 5 + [""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VIT, "--out", "{}", "--number", "0"), "--number 0: must be 1 or more"),
        ((VIT, "--out", "{}", "--start", "1442"), "--start 1442: the data set has images 0 to 1441"),
        ((VIT, "--out", "README.md"), "--out README.md: is a file of another kind"),
        (("configs/_base_/default_runtime.py", "--out", "{}"), "has no train_dataloader"),
        (("configs/classification/deit-tiny-lors_cifar100.py", "--out", "{}"), "cifar-100-python does not exist"),
    ],
)
def test_browse_refuses(arguments, message, tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    arguments = [argument.format(tmp_path / "out") for argument in arguments]
    assert message in refused(TOOL, arguments, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()
