"""docs/custom_data.md: its code, run as a new user would, on a dozen pictures and for two iterations."""

import json
import re
import sys
from pathlib import Path

import mmcv
import pytest
from conftest import ROOT, is_picture, load_tool, refused

CODE = dict(
    re.findall(r"^```python\n# (\S+)\n(.*?)^```", (ROOT / "docs" / "custom_data.md").read_text(), re.M | re.S),
)
ERRORS = re.findall(r"^\|.*\| `error: (.*)` \|$", (ROOT / "docs" / "custom_data.md").read_text(), re.M)
SHORT = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1"] + [
    f"{split}_dataloader.{setting}"
    for split in ("train", "val", "test")
    for setting in ("num_workers=0", "persistent_workers=False")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The user's folder, with 15 pictures instead of 200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("user"))
        exec(CODE["make_shapes.py"].replace("range(200)", "range(15)"), {})
        exec(CODE["split.py"], {})
        Path("shapes.py").write_text(CODE["shapes.py"])
        return Path.cwd()


@pytest.fixture
def tool(folder, monkeypatch):
    """Run a tool's main() in the user's folder."""
    monkeypatch.chdir(folder)

    def call(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        load_tool(f"{name}.py").main()

    return call


def test_the_page_goes_from_pictures_to_detections(folder, tool, capsys):
    assert [
        len(json.loads((folder / f"my_shapes/{part}.json").read_text())["images"]) for part in ("train", "val")
    ] == [
        12,
        3,
    ]
    tool("analysis_tools/browse_dataset", "shapes.py", "--number", "8", "--out", "browse.png")
    assert "train of shapes.py: 12 images" in capsys.readouterr().out and is_picture(folder / "browse.png")

    tool("train", "shapes.py", "--cfg-options", *SHORT)
    checkpoint = "work_dirs/shapes/epoch_1.pth"
    tool("test", "shapes.py", checkpoint, "--metrics", "metrics.json", "--cfg-options", *SHORT)
    assert 0 <= json.loads((folder / "metrics.json").read_text())["coco/bbox_mAP"] <= 1

    tool("infer", "my_shapes/pictures/0000.jpg", "shapes.py", checkpoint, "--json", "--score-thr", "0")
    found = json.loads((folder / "work_dirs/infer/predictions.jsonl").read_text())
    assert {box["class"] for box in found["boxes"]} <= {"circle", "square"} and len(found["boxes"]) == 20
    assert mmcv.imread(str(folder / "work_dirs/infer/0000.jpg")).shape == (360, 480, 3)


@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [
        ('"square")', '"squares")', "has no category 'squares'"),
        ('("circle", "square")', '("square", "circle")', "where the config's classes have 'square'"),
        ("num_classes=2", "num_classes=10", "num_classes is 10"),
        ('"train.json"', '"trian.json"', "trian.json does not exist"),
        ('"pictures/"', '"images/"', "image folder my_shapes/images"),
    ],
)
def test_the_page_has_the_line_that_a_mistake_ends_with(right, wrong, line, folder, tmp_path, monkeypatch, capsys):
    config = tmp_path / "wrong.py"
    config.write_text(CODE["shapes.py"].replace(right, wrong))
    monkeypatch.chdir(folder)
    message = refused("train.py", [str(config), "--work-dir", str(tmp_path)], monkeypatch, capsys)
    [expected] = [error for error in ERRORS if line in error]
    assert message.removeprefix("error: ").startswith(expected.removesuffix("..."))
