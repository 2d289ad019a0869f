"""The digits data set is real, deterministic, tightly annotated, and written as a whole or not at all."""

import errno
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import load_tool
from PIL import Image

pytest.importorskip("sklearn")

TOOL = Path(__file__).parents[2] / "tools" / "dataset_converters" / "digits_to_coco.py"


tool = load_tool("dataset_converters/digits_to_coco.py")
parts = sys.modules["digit_scenes"]
SMALL = {"train_images": 12, "val_images": 8, "size": 64, "seed": 3}
SMALL_ARGS = ["--train-images", "12", "--val-images", "8", "--size", "64", "--seed", "3"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def annotations(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


@pytest.fixture(scope="module")
def sources():
    return parts.load_sources(seed=0)


@pytest.fixture(scope="module")
def scenes(sources):
    """The first 400 training scenes of the default data set."""
    return [parts.compose_scene(sources["train"], 96, parts.scene_rng(0, "train", i)) for i in range(400)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "small"
    assert tool.build(folder, train_images=40, val_images=40, size=64, seed=3)
    return folder


def test_same_seed_gives_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tool.build(tmp_path / name, **{**SMALL, "seed": seed})
        assert [len(list((tmp_path / name / split).iterdir())) for split in ("train", "val")] == [12, 8]
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a["train/000001.png"] != c["train/000001.png"]


def test_an_image_does_not_depend_on_the_count(dataset, tmp_path):
    tool.build(tmp_path / "few", **SMALL)
    few, many = contents(tmp_path / "few"), contents(dataset)
    assert all(few[name] == many[name] for name in few if name.endswith(".png"))
    few, many = annotations(tmp_path / "few", "train"), annotations(dataset, "train")
    assert few["images"] == many["images"][:12]
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]


def test_train_and_val_share_no_digit_and_no_photo_half(dataset, sources):
    from sklearn.datasets import load_digits, load_sample_images

    labels = load_digits().target
    used = {}
    for split in ("train", "val"):
        coco = annotations(dataset, split)
        used[split] = {a["digit_index"] for a in coco["annotations"]}
        names = {c["id"]: c["name"] for c in coco["categories"]}
        assert all(names[a["category_id"]] == str(labels[a["digit_index"]]) for a in coco["annotations"])
    assert used["train"] and used["val"] and not used["train"] & used["val"]

    train, val = sources["train"], sources["val"]
    assert sorted([*train.pool, *val.pool]) == list(range(1797))
    assert np.bincount(labels[val.pool]).min() >= 34
    for left, right, photo in zip(train.regions, val.regions, load_sample_images().images, strict=True):
        assert np.array_equal(np.concatenate([left, right], axis=1), photo)


def test_boxes_are_tight_around_what_pasting_changed(scenes):
    alone = exact = 0
    for scene in scenes:
        changed = (scene.image != scene.background).any(axis=-1)
        boxes = [paste.box for paste in scene.pastes]
        for box in boxes:
            if any(box.touches(other) for other in boxes if other is not box):
                continue
            alone += 1
            margin = parts.Box(max(box.x0 - 1, 0), max(box.y0 - 1, 0), box.x1 + 1, box.y1 + 1)
            rows, columns = np.nonzero(changed[margin.window])
            x0, y0 = columns.min() + margin.x0, rows.min() + margin.y0
            x1, y1 = columns.max() + margin.x0 + 1, rows.max() + margin.y0 + 1
            exact += (x0, y0, x1, y1) == (box.x0, box.y0, box.x1, box.y1)
        for box in boxes:
            changed[box.window] = False
        assert not changed.any()
    # An edge of a single pixel may by chance have the ink's own colour already, but rarely.
    assert alone > 300
    assert exact / alone > 0.99


def test_mask_extent_is_the_visible_ink(sources):
    for index in range(0, 1797, 60):
        mask = parts.render_digit(sources["train"].digits[index], height=30, aspect=1.2, angle=8)
        visible = mask >= parts.MIN_VISIBLE_ALPHA
        assert np.array_equal(visible, mask > 0)
        assert visible[0].any() and visible[-1].any() and visible[:, 0].any() and visible[:, -1].any()
        assert mask.max() == 1 and 24 <= mask.shape[0] <= 36


def test_boxes_lie_inside_and_overlap_little(scenes):
    for scene in scenes:
        boxes = [paste.box for paste in scene.pastes]
        assert all(min(b.x0, b.y0) >= 0 and max(b.x1, b.y1) <= 96 for b in boxes)
        assert all(b.x1 - b.x0 >= 3 and b.y1 - b.y0 >= 8 for b in boxes)
        assert all(a.iou(b) < 0.3 for a, b in combinations(boxes, 2))


def test_ink_never_covers_ink():
    mask = np.eye(4)
    box = parts.Box(2, 2, 6, 6)
    inked = np.zeros((8, 8), dtype=bool)
    inked[2, 5] = True
    assert parts.first_fitting(mask, [box], inked, []) == box
    inked[3, 3] = True
    assert parts.first_fitting(mask, [box], inked, []) is None


def test_boxes_that_overlap_too_much_are_passed_over():
    placed = [parts.Paste(0, 0, parts.Box(0, 0, 4, 4))]
    mask, inked = np.ones((4, 4)), np.zeros((8, 8), dtype=bool)
    third, seventh = parts.Box(2, 0, 6, 4), parts.Box(3, 0, 7, 4)
    assert third.iou(placed[0].box) == pytest.approx(8 / 24)
    assert seventh.iou(placed[0].box) == pytest.approx(4 / 28)
    assert parts.first_fitting(mask, [third], inked, placed) is None
    assert parts.first_fitting(mask, [third, seventh], inked, placed) == seventh


def test_default_statistics(scenes):
    coco = tool.empty_coco(tool.Options(), "train")
    for i, scene in enumerate(scenes):
        tool.add_scene(coco, f"{i}.png", scene)
    counts = tool.summarise(coco)
    heights = [a["bbox"][3] for a in coco["annotations"]]
    assert counts["images"] == 400 and 2.5 < counts["digits"] / 400 < 3.1
    assert 0.05 < counts["empty_share"] < 0.12
    assert 0.1 < counts["small_share"] < 0.3
    assert 60 <= counts["touching_pairs"] <= 400
    assert min(heights) < 15 and max(heights) > 45
    assert {a["category_id"] for a in coco["annotations"]} == set(range(1, 11))


def test_pairs_are_placed_side_by_side(scenes):
    """A purposeful pair meets in x, shares rows and differs little in height."""
    pairs = 0
    for scene in scenes:
        if len(scene.pastes) >= 2:
            a, b = (paste.box for paste in scene.pastes[:2])
            gap = max(a.x0, b.x0) - min(a.x1, b.x1)
            rows = min(a.y1, b.y1) - max(a.y0, b.y0)
            pairs += -1 <= gap <= 1 and rows > 0.6 * min(a.y1 - a.y0, b.y1 - b.y0)
    assert 0.10 < pairs / len(scenes) < 0.22


def test_ink_stands_out():
    rng = np.random.default_rng(0)
    half_white = np.zeros((10, 10, 3), np.float32)
    half_white[:5] = 255
    for patch in (np.full((9, 7, 3), 128, np.float32), half_white):
        assert all(parts.contrast(patch, parts.pick_colour(patch, None, rng)) >= 90 for _ in range(50))
    grey, red = np.full((9, 7, 3), 128, np.float32), np.array([250, 10, 10], np.float32)
    assert parts.pick_colour(grey, red, rng) is red
    assert parts.pick_colour(grey, grey[0, 0], rng) is not grey[0, 0]
    assert parts.contrast(grey, np.array([128, 128, 28], np.float32)) == pytest.approx(100)


def test_pycocotools_reads_and_scores_it(dataset):
    coco_module = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    coco = coco_module.COCO(str(dataset / "annotations" / "val.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list("0123456789")
    images = coco.loadImgs(coco.getImgIds())
    assert len(images) == 40 and any(not coco.getAnnIds(i["id"]) for i in images)
    for image in images:
        with Image.open(dataset / "val" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (64, 64) and picture.mode == "RGB"
    truth = [{**a, "score": 0.9} for a in coco.dataset["annotations"]]
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in truth)
    evaluation = COCOeval(coco, coco.loadRes(truth), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_info_tells_the_options(dataset):
    info = annotations(dataset, "val")["info"]
    assert info["options"] == {"train_images": 40, "val_images": 40, "size": 64, "seed": 3}
    assert info["version"] == tool.GENERATOR_VERSION and info["split"] == "val"


@pytest.mark.parametrize("size", [32, 33, 200])
def test_other_sizes(tmp_path, size):
    tool.build(tmp_path / "d", train_images=6, val_images=1, size=size)
    with Image.open(tmp_path / "d" / "train" / "000006.png") as picture:
        assert picture.size == (size, size)
    assert annotations(tmp_path / "d", "train")["annotations"]


def test_second_run_does_nothing(tmp_path, capsys):
    out = tmp_path / "new" / "d"
    assert tool.main(["--out", str(out), *SMALL_ARGS]) == 0
    first = capsys.readouterr()
    assert "written" in first.out and "train 12 images" in first.out and first.err == ""
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert tool.main(["--out", str(out), *SMALL_ARGS]) == 0
    assert "nothing done" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert [path.name for path in out.parent.iterdir()] == ["d"]


def test_version_and_missing_images_count_as_another_data_set(tmp_path, monkeypatch):
    tool.build(tmp_path / "d", **SMALL)
    options = tool.Options(**SMALL)
    assert tool.holds(tmp_path / "d", options)
    with monkeypatch.context() as patch:
        patch.setattr(tool, "GENERATOR_VERSION", "0")
        assert not tool.holds(tmp_path / "d", options)
    (tmp_path / "d" / "val" / "000002.png").unlink()
    assert not tool.holds(tmp_path / "d", options)


def test_another_data_set_needs_force(tmp_path, capsys):
    out = tmp_path / "d"
    tool.build(out, **SMALL)
    before = contents(out)
    other = ["--out", str(out), *SMALL_ARGS[:-1], "4"]
    assert tool.main(other) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--force" in error
    assert contents(out) == before
    assert tool.main([*other, "--force"]) == 0
    assert annotations(out, "train")["info"]["options"]["seed"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_force_never_removes_foreign_files(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert tool.main(["--out", str(tmp_path), *SMALL_ARGS, "--force"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "thesis.txt" in error
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "d").mkdir()
    assert tool.build(tmp_path / "d", **SMALL)
    assert tool.holds(tmp_path / "d", tool.Options(**SMALL))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "31"], "size is 31, must be 32 to 1024"),
        (["--size", "1025"], "size is 1025"),
        (["--size", "big"], "argument --size"),
        (["--train-images", "0"], "train-images is 0, must be at least 1"),
        (["--val-images", "-2"], "val-images is -2"),
        (["--seed", "-1"], "seed is -1, must be 0 or more"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_bad_option_is_one_line(tmp_path, capsys, args, message):
    try:
        code = tool.main(["--out", str(tmp_path / "new" / "d"), *args])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1 and message in captured.err and captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "d", "d/e"])
def test_file_in_the_way_is_one_line(tmp_path, capsys, below):
    (tmp_path / "file").write_text("text")
    assert tool.main(["--out", str(tmp_path / "file" / below), *SMALL_ARGS]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "file is a file, must be a folder" in error
    assert contents(tmp_path) == {"file": b"text"}


def fail_at_fifth_image(monkeypatch, error: BaseException) -> None:
    save, calls = Image.Image.save, []

    def failing_save(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise error
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", failing_save)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failure_midway_leaves_nothing_behind(tmp_path, capsys, monkeypatch, error, code, message):
    fail_at_fifth_image(monkeypatch, error)
    assert tool.main(["--out", str(tmp_path / "new" / "deep" / "d"), *SMALL_ARGS]) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line
    assert not list(tmp_path.iterdir())


def test_failure_midway_keeps_the_old_data_set(tmp_path, monkeypatch):
    tool.build(tmp_path / "d", **SMALL)
    before = contents(tmp_path)
    fail_at_fifth_image(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert tool.main(["--out", str(tmp_path / "d"), "--force"]) == 1
    assert contents(tmp_path) == before


def test_failed_swap_puts_the_old_data_set_back(tmp_path, monkeypatch):
    tool.build(tmp_path / "d", **SMALL)
    before = contents(tmp_path)
    rename = Path.rename

    def failing_rename(self, target):
        if self.suffix == ".new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    assert tool.main(["--out", str(tmp_path / "d"), *SMALL_ARGS[:-1], "4", "--force"]) == 1
    assert contents(tmp_path) == before


def test_script_runs_from_the_shell(tmp_path):
    def run(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(TOOL), *args], capture_output=True, text=True, cwd=tmp_path)

    usage = run("--help")
    assert usage.returncode == 0
    for option in ("--out", "--train-images", "--val-images", "--size", "--seed", "--force"):
        assert option in usage.stdout
    refused = run("--size", "8")
    assert refused.returncode == 2 and refused.stderr == (
        "digits_to_coco.py: error: size is 8, must be 32 to 1024 pixels\n"
    )
    done = run("--train-images", "2", "--val-images", "2")
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "data" / "digits" / "val" / "000002.png").exists()
