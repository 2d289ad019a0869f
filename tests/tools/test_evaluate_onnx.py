"""Evaluating exported files side by side: the config's metric on pictures of the files' size, and what is refused."""

import json
import shutil

import pytest
from conftest import LORS_DIGITS, refused
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOOL = "deployment/evaluate_onnx.py"


def write(path, box, batch="N", size=(64, 32), boxes="boxes"):
    """A file that finds one box of class 3 in every picture: ``box`` times the share of red in its first pixel."""
    images = f"float[{batch}, 3, {size[1]}, {size[0]}] images"
    model = f"""<ir_version: 9, opset_import: ["": 18]>
    file ({images}) => (float[1, 1, 4] {boxes}, float[1, 1] scores, int64[1, 1] labels) {{
        first = Constant <value_ints = [0, 0, 0, 0]> ()
        end = Constant <value_ints = [1, 1, 1, 1]> ()
        axis = Constant <value_ints = [3]> ()
        most = Constant <value_float = 255.0> ()
        box = Constant <value = float[1, 1, 4] {{{", ".join(map(str, box))}}}> ()
        pixel = Slice (images, first, end)
        red = Squeeze (pixel, axis)
        share = Div (red, most)
        {boxes} = Mul (box, share)
        scores = Constant <value = float[1, 1] {{0.9}}> ()
        labels = Constant <value = int64[1, 1] {{3}}> ()
    }}"""
    onnx.save(onnx.parser.parse_model(model), path)
    return str(path)


@pytest.fixture
def red_pictures(tmp_path, tiny_digits):
    """--cfg-options for red pictures of 96x96 with one box of class 3 each: 24 to 72 across, 12 to 60 down."""
    data = tmp_path / "data"
    shutil.copytree(tiny_digits, data)
    annotations = data / "annotations" / "val.json"
    content = json.loads(annotations.read_text())
    for image in content["images"]:
        Image.new("RGB", (96, 96), (255, 0, 0)).save(data / "val" / image["file_name"])
    label = next(category["id"] for category in content["categories"] if category["name"] == "3")
    content["annotations"] = [
        dict(id=i, image_id=image["id"], category_id=label, bbox=[24, 12, 48, 48], area=48 * 48, iscrowd=0)
        for i, image in enumerate(content["images"], 1)
    ]
    annotations.write_text(json.dumps(content))
    loader = "test_dataloader"
    return ["--cfg-options", f"{loader}.dataset.data_root={data}", f"test_evaluator.ann_file={annotations}",
            f"{loader}.num_workers=0", f"{loader}.persistent_workers=False"]  # fmt: skip


RIGHT, WRONG = [16, 4, 48, 20], [24, 12, 72, 60]
"""The box in pixels of an input of 64x32, and in pixels of the picture."""


def test_boxes_of_the_files_size_are_evaluated_in_the_pictures(tmp_path, red_pictures, call_tool, capsys):
    right = write(tmp_path / "right.onnx", RIGHT)
    twice = write(tmp_path / "twice.onnx", RIGHT, batch=2)
    wrong = write(tmp_path / "wrong.onnx", WRONG)
    call_tool(TOOL, LORS_DIGITS, right, twice, wrong, "--rounds", 1, "--pictures", 1, *red_pictures)
    rows = {line.split()[1]: line.split()[3::2] for line in capsys.readouterr().out.splitlines() if ".onnx" in line}
    assert [rows[name][1:3] for name in ("right.onnx", "twice.onnx", "wrong.onnx")] == [
        ["1.000", "1.000"],
        ["1.000", "1.000"],
        ["0.000", "0.000"],
    ]
    assert rows["right.onnx"][4] == rows["right.onnx"][6] == "1.00"
    assert all(float(value) >= 0 for row in rows.values() for value in row)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([("W", "H")], [], "--size WxH is needed: the files take any size"),
        ([("W", "H")], ["--size", "60x32"], "--size '60x32' must be WIDTHxHEIGHT in pixels, both multiples of 32"),
        ([(64, 32), (96, 96)], [], "1.onnx takes 96x96, not 64x32"),
        ([(64, 32)], ["--size", "96x96"], "0.onnx takes 64x32, not 96x96"),
        ([(64, 32)], ["--rounds", "0"], "--rounds and --pictures must be 1 or more"),
        ([(64, 32)], ["--cfg-options", "test_dataloader.dataset.pipeline=[]"], "pipeline must have one Resize step"),
        ([(64, 32)], ["--cfg-options", "test_dataloader.dataset.data_root=none"], "data folder none does not exist"),
    ],
)
def test_refuses(sizes, options, message, tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    files = [write(tmp_path / f"{i}.onnx", RIGHT, size=size) for i, size in enumerate(sizes)]
    assert message in refused(TOOL, [LORS_DIGITS, *files, *options], monkeypatch, capsys)


def test_refuses_what_export_onnx_did_not_write(tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    other = write(tmp_path / "other.onnx", RIGHT, boxes="bboxes")
    assert "was not written by export_onnx.py" in refused(TOOL, [LORS_DIGITS, other], monkeypatch, capsys)
    (tmp_path / "text.onnx").write_text("text")
    for name in ("none.onnx", "text.onnx"):
        path = str(tmp_path / name)
        assert f"{path} cannot be opened: " in refused(TOOL, [LORS_DIGITS, path], monkeypatch, capsys)
