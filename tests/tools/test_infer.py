"""tools/infer.py and the Inferencer: boxes as mmdet gives them, files that others can read, one-line errors."""

import json
import sys
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, load_tool, refused, write_random_lors
from mmdet.apis import DetInferencer
from PIL import Image
from pycocotools.coco import COCO

from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer
from mmdet_lors.inference.results import CocoIds
from mmdet_lors.inference.sources import find_sources, picture_paths

CONFIG = str(ROOT / LORS_DIGITS)
CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_random_lors(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def inferencer(checkpoint) -> Inferencer:
    return Inferencer(CONFIG, checkpoint, "cpu", show_progress=False)


@pytest.fixture(scope="module")
def images(tiny_digits) -> list[str]:
    return sorted(str(p) for p in (tiny_digits / "val").iterdir())


@pytest.fixture
def infer(monkeypatch, capsys):
    """Run the tool in this process; its output."""

    def call(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments), "--device", "cpu"])
        load_tool("infer.py").main()
        return capsys.readouterr().out

    return call


def lines(folder: Path) -> list[dict]:
    """The results in predictions.jsonl."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def assert_equal(ours, theirs, tolerance=1e-4):
    for key in ("bboxes", "scores"):
        assert torch.allclose(ours.pred_instances[key], theirs.pred_instances[key], rtol=0, atol=tolerance), key
    assert torch.equal(ours.pred_instances.labels, theirs.pred_instances.labels)


def test_boxes_equal_those_of_mmdets_unfolded_inference(inferencer, checkpoint, images):
    theirs = DetInferencer(CONFIG, checkpoint, "cpu", show_progress=False)
    assert inferencer.model.decoder.lorsa.folded is not None and theirs.model.decoder.lorsa.folded is None
    expected = theirs(images, return_datasamples=True)["predictions"]
    found = list(inferencer.stream(images))
    assert [source for source, _ in found] == images
    for (_, sample), reference in zip(found, expected, strict=True):
        assert len(sample.pred_instances) == 20
        assert_equal(sample, reference)
        assert sample.pred_instances.bboxes.std(dim=0).min() > 5, "the boxes are all one"


def test_batch_size_does_not_change_results(inferencer, images):
    for (_, one), (_, four) in zip(inferencer.stream(images), inferencer.stream(images, 4), strict=True):
        assert_equal(one, four)


def test_batches_of_mixed_sizes_do_not_change_results(inferencer, images):
    arrays = [mmcv.imread(path)[: 60 + 12 * (i // 2 % 3)] for i, path in enumerate(images)]
    one, four = list(inferencer.stream(arrays)), list(inferencer.stream(arrays, 4))
    assert [len(source) for source, _ in four] == [len(array) for array in arrays] == [60, 60, 72, 72, 84, 84, 60, 60]
    for (_, ours), (_, theirs) in zip(one, four, strict=True):
        assert_equal(ours, theirs)


def test_an_array_gives_what_its_file_gives(inferencer, images):
    for (_, file), (_, array) in zip(
        inferencer.stream(images[:2]), inferencer.stream(map(mmcv.imread, images[:2])), strict=True
    ):
        assert_equal(file, array)


def test_the_call_is_det_inferencers(inferencer, images, tmp_path):
    result = inferencer(images[:2], batch_size=2, return_vis=True, out_dir=str(tmp_path), no_save_pred=False)
    assert [len(p["scores"]) for p in result["predictions"]] == [20, 20]
    assert result["visualization"][0].shape == (480, 480, 3)  # 96 pixels, enlarged
    name = Path(images[0]).stem
    assert json.loads((tmp_path / "preds" / f"{name}.json").read_text()) == result["predictions"][0]
    assert mmcv.imread(str(tmp_path / "vis" / f"{name}.png")).shape == (480, 480, 3)


def test_class_names_come_from_the_config_when_the_checkpoint_has_none(checkpoint, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(checkpoint, weights_only=True)["state_dict"], bare)
    assert Inferencer(CONFIG, bare, "cpu").classes == CLASSES


def test_fewer_names_than_classes_are_refused(checkpoint, images, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["meta"]["dataset_meta"] = dict(classes=())
    torch.save(content, tmp_path / "names.pth")
    with pytest.raises(UserError, match=r"the detector predicts class \d, but checkpoint and config name 0 classes"):
        list(Inferencer(CONFIG, tmp_path / "names.pth", "cpu").stream(images[:1]))


def test_drawing_leaves_colours_and_boxes_below_the_threshold_alone(inferencer):
    image = np.zeros((500, 500, 3), np.uint8)
    image[..., 0] = 200  # blue, in BGR
    _, sample = next(inferencer.stream([image]))
    assert np.array_equal(inferencer.draw(image, sample, 1.0), image[..., ::-1])
    assert not np.array_equal(inferencer.draw(image, sample, 0.0), image[..., ::-1])


def test_folder_becomes_pictures_json_and_coco_results(infer, checkpoint, tiny_digits, images, tmp_path):
    out, coco, truth = tmp_path / "out", tmp_path / "coco.json", tiny_digits / "annotations" / "val.json"
    options = ("--json", "--coco", coco, "--ann-file", truth, "--batch-size", "3", "--score-thr", "0.02")
    printed = infer(tiny_digits / "val", CONFIG, checkpoint, "--out", out, *options)
    assert sorted(p.name for p in out.glob("*.png")) == [Path(image).name for image in images]
    rows = lines(out)
    assert [row["image"] for row in rows] == images and (rows[0]["width"], rows[0]["height"]) == (96, 96)
    listed = [box for row in rows for box in row["boxes"] if box["score"] > 0.02]
    assert f"8 images, {len(listed)} boxes with a score above 0.02" in printed
    assert all(len(row["boxes"]) == 20 and len(row["boxes"][0]["bbox"]) == 4 for row in rows)
    assert all(box["class"] == CLASSES[box["label"]] for row in rows for box in row["boxes"])
    truth = COCO(str(truth))
    results = truth.loadRes(str(coco))
    assert set(results.getImgIds()) == set(truth.getImgIds()) and len(results.anns) == 8 * 20
    ids = {row["file_name"]: row["id"] for row in truth.dataset["images"]}
    for row in rows:
        written = results.imgToAnns[ids[Path(row["image"]).name]]
        written.sort(key=lambda a: -a["score"])
        for box, annotation in zip(row["boxes"], written, strict=True):
            x1, y1, x2, y2 = box["bbox"]
            assert annotation["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
            assert truth.cats[annotation["category_id"]]["name"] == box["class"]
    assert max(box["bbox"][0] for box in listed) > 1, "a box at the left edge does not show its width"


def test_without_annotations_ids_are_counted(infer, checkpoint, images, tmp_path):
    coco = tmp_path / "coco.json"
    printed = infer(*images[:2], CONFIG, checkpoint, "--out", tmp_path / "out", "--no-pictures", "--coco", coco)
    assert "ids are counted from 1" in printed
    assert {row["image_id"] for row in json.loads(coco.read_text())} == {1, 2}
    assert not list((tmp_path / "out").glob("*.png"))


def annotations(tmp_path, names: list[str], categories=("a", "b"), size=(96, 96)) -> Path:
    """An annotation file of these images, with ids from 11 on."""
    content = dict(
        images=[dict(id=i, file_name=name, width=size[0], height=size[1]) for i, name in enumerate(names, start=11)],
        categories=[dict(id=i, name=name) for i, name in enumerate(categories, start=5)],
        annotations=[],
    )
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("names", "images", "ids"),
    [
        (["cam1/0.png", "cam2/0.png"], ["data/cam2/0.png", "data/cam1/0.png"], [12, 11]),
        (["cam1/0.png", "cam2/0.png"], ["data/cam2/0.png"], [12]),
        (["0.png", "cam1/0.png"], ["data/0.png", "data/cam1/0.png"], [11, 12]),
        (["./cam1/0.png"], ["data/cam1/../cam1/0.png"], [11]),
        (["cafe\u0301.png"], ["data/caf\u00e9.png"], [11]),
        (["train/0.png", "val/1.png"], ["elsewhere/val/1.png", "train/0.png"], [12, 11]),
    ],
)
def test_an_image_is_found_by_the_end_of_its_path(names, images, ids, tmp_path):
    found = CocoIds.from_annotations(annotations(tmp_path, names), images, ("a", "b"))
    assert [found.images[image] for image in images] == ids


def test_categories_are_found_by_name_in_any_order(tmp_path):
    path = annotations(tmp_path, ["0.png"], categories=("c", "b", "a"))
    assert CocoIds.from_annotations(path, ["0.png"], ("a", "b")).categories == [7, 6]
    with pytest.raises(UserError, match=r"has no category 'd' of the checkpoint's 2 classes; it has 'c', 'b', 'a'"):
        CocoIds.from_annotations(path, ["0.png"], ("a", "d"))


@pytest.mark.parametrize(
    ("names", "images", "message"),
    [
        (["0.png", "cam1/0.png"], ["data/cam1/0.png"], r"may be .*'(cam1/)?0.png' \(id 1[12]\) or '(cam1/)?0.png'"),
        (["0.png", "0.png"], ["0.png"], r"may be '0.png' \(id 11\) or '0.png' \(id 12\)"),
        (["0.png"], ["a/0.png", "b/0.png"], "images a/0.png and b/0.png are both '0.png'"),
        (["cam2/0.png"], ["cam1/0.png"], "is the end of cam1/0.png; it has 'cam2/0.png', whose folder is another"),
        (["1.png"], ["0.png"], "has no image whose file_name is the end of 0.png"),
    ],
)
def test_images_that_cannot_be_told_apart_are_refused(names, images, message, tmp_path):
    with pytest.raises(UserError, match=message):
        CocoIds.from_annotations(annotations(tmp_path, names), images, ("a",))


@pytest.mark.parametrize(("orientation", "said"), [(6, (96, 64)), (3, (96, 64)), (None, (95, 64))])
def test_annotations_of_another_frame_or_size_are_refused(orientation, said, checkpoint, tmp_path, monkeypatch, capsys):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (96, 64)).save(tmp_path / "0.jpg", exif=exif)
    path = annotations(tmp_path, ["0.jpg"], categories=CLASSES, size=said)
    options = ["--device", "cpu", "--no-pictures", "--coco", str(tmp_path / "r.json"), "--ann-file", str(path)]
    message = refused("infer.py", [str(tmp_path / "0.jpg"), CONFIG, checkpoint, *options], monkeypatch, capsys)
    assert ("EXIF orientation" if orientation else "has 96 x 64 pixels, but its annotation says 95 x 64") in message
    assert not (tmp_path / "r.json").exists()


def test_annotations_of_the_shown_frame_are_taken(infer, checkpoint, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "0.jpg", exif=exif)
    path = annotations(tmp_path, ["0.jpg"], categories=CLASSES, size=(64, 96))
    options = ("--coco", tmp_path / "r.json", "--ann-file", path, "--json", "--out", tmp_path / "out")
    infer(tmp_path / "0.jpg", CONFIG, checkpoint, *options)
    (row,) = lines(tmp_path / "out")
    assert (row["width"], row["height"]) == (64, 96)
    assert mmcv.imread(str(tmp_path / "out" / "0.jpg")).shape == (480, 320, 3)
    assert len(json.loads((tmp_path / "r.json").read_text())) == 20


def test_every_image_has_a_picture_of_its_own(tmp_path):
    names = ["a.bmp", "a.bmp.png", "B.png", "b.png", "x" * 250 + ".png"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    images, _ = find_sources([str(tmp_path), str(tmp_path / "." / "b.png")])
    assert len(images) == len(names)
    pictures = [path.name for path in picture_paths(images, tmp_path / "out").values()]
    assert {"B.png", "a.bmp.png", "a.bmp-2.png", "b-2.png"} < set(pictures)
    assert len({name.casefold() for name in pictures}) == len(names) and max(map(len, pictures)) <= 200
    with pytest.raises(UserError, match="would overwrite"):  # a.bmp's picture would be another image
        picture_paths([str(tmp_path / "a.bmp"), str(tmp_path / "a.bmp.png")], tmp_path)


def test_images_of_one_name_in_two_folders_keep_both_pictures(infer, checkpoint, images, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.bmp").write_bytes(Path(images[0]).read_bytes())
    infer(tmp_path / "a", tmp_path / "b", CONFIG, checkpoint, "--out", tmp_path / "out")
    assert (tmp_path / "out/a/1.bmp.png").is_file() and (tmp_path / "out/b/1.bmp.png").is_file()


def test_video_becomes_a_video_and_boxes_per_frame(infer, inferencer, checkpoint, images, tmp_path):
    video = tmp_path / "digits.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 96))
    for image in images[:3]:
        writer.write(mmcv.imread(image))
    writer.release()
    out = tmp_path / "out"
    printed = infer(video, CONFIG, checkpoint, "--out", out, "--json", "--score-thr", "0.02", "--batch-size", "2")
    drawn = mmcv.VideoReader(str(out / "digits.mp4"))
    assert (drawn.frame_cnt, drawn.fps, drawn.resolution) == (3, 10, (480, 480))
    rows = lines(out)
    assert [row["frame"] for row in rows] == [0, 1, 2] and "3 frames" in printed
    frames = list(mmcv.VideoReader(str(video)))
    for row, (_, sample) in zip(rows, inferencer.stream(frames), strict=True):
        scores = sample.pred_instances.scores
        assert [b["score"] for b in row["boxes"]] == pytest.approx(scores[scores > 0.02].tolist(), abs=1e-5)


def test_an_unreadable_image_among_others_is_named_and_skipped(infer, checkpoint, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    printed = infer(broken, images[0], CONFIG, checkpoint, "--out", tmp_path / "out", "--batch-size", "2")
    assert f"skipped {broken}: it cannot be read as an image" in printed and "1 images" in printed


def test_a_picture_that_cannot_be_written_ends_in_one_line(checkpoint, images, tmp_path, monkeypatch, capsys):
    (tmp_path / Path(images[0]).name).mkdir()
    message = refused("infer.py", [images[0], CONFIG, checkpoint, "--out", str(tmp_path)], monkeypatch, capsys)
    assert "cannot be written" in message


@pytest.fixture
def places(checkpoint, images, tiny_digits, tmp_path) -> dict[str, str]:
    """Good inputs and bad ones, by name."""
    names = ("empty.jpg", "empty.txt", "broken.jpg", "broken2.jpg", "broken.mp4", "note.md", "broken.pth", "other.json")
    for name in names:
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"{}")
    (tmp_path / "nothing").mkdir()
    no_detector = f"_base_ = {CONFIG!r}\nmodel = dict(_delete_=True, type='ImgDataPreprocessor')\n"
    (tmp_path / "no_detector.py").write_text(no_detector)
    others = ("nothing", "out", "none.jpg", "none.pth", "no_detector.py")
    found = {name.replace(".", "_"): str(tmp_path / name) for name in (*names, *others)}
    folder = str(tiny_digits / "val")
    return found | dict(image=images[0], folder=folder, config=CONFIG, checkpoint=checkpoint, root=str(ROOT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{none_jpg} {config} {checkpoint}", "none.jpg does not exist"),
        ("{nothing} {config} {checkpoint}", "nothing has no images (.jpg, "),
        ("{note_md} {config} {checkpoint}", "note.md is neither an image (.jpg, "),
        ("{broken_jpg} {config} {checkpoint}", "broken.jpg cannot be read as an image"),
        ("{empty_jpg} {config} {checkpoint}", "empty.jpg cannot be read as an image"),
        ("{broken_jpg} {broken2_jpg} {config} {checkpoint}", "none of the 2 inputs can be read as an image"),
        ("{root}/none/*.jpg {config} {checkpoint}", "none/*.jpg names no images"),
        ("{empty_txt} {config} {checkpoint}", "empty.txt names no images"),
        ("{other_json} {config} {checkpoint}", "is not a COCO data set"),
        ("{broken_mp4} {config} {checkpoint}", "broken.mp4 cannot be read as a video"),
        ("{broken_mp4} {image} {config} {checkpoint}", "broken.mp4 is a video: give it as the only input"),
        ("{broken_mp4} {config} {checkpoint} --coco {other_json}", "--coco is for images"),
        ("{image} none.py {checkpoint}", "config none.py does not exist"),
        ("{image} {config} {none_pth}", "none.pth does not exist"),
        ("{image} {config} {broken_pth}", "broken.pth "),
        ("{image} {root}/" + PLAIN_DIGITS + " {checkpoint}", "is of another architecture"),
        ("{image} {root}/configs/classification/vit_digits.py {checkpoint}", "has no test_dataloader.dataset.pipeline"),
        ("{image} {no_detector_py} {checkpoint}", "model.type ImgDataPreprocessor is not a detector"),
        (
            "{image} {config} {checkpoint} --device cuda:0",
            "device cuda:0: this machine has no GPU that PyTorch can use",
        ),
        ("{image} {config} {checkpoint} --device tpux", "device 'tpux' is not known"),
        ("{image} {config} {checkpoint} --batch-size 0", "--batch-size 0: must be 1 or more"),
        ("{image} {config} {checkpoint} --workers -1", "--workers -1: must be 0 or more"),
        ("{image} {config} {checkpoint} --resume", "--resume goes on with predictions.jsonl, which --json"),
        ("{broken_mp4} {config} {checkpoint} --json --resume", "--resume is for images"),
        ("{image} {config} {checkpoint} --score-thr 30", "--score-thr 30.0: must be from 0 to 1"),
        ("{image} {config} {checkpoint} --no-pictures", "--no-pictures leaves nothing to write"),
        ("{image} {config} {checkpoint} --ann-file {other_json}", "--ann-file is for --coco"),
        ("{image} {config} {checkpoint} --coco none/coco.json", "folder none does not exist"),
        ("{image} {config} {checkpoint} --coco {out}.json --ann-file {other_json}", "is not a COCO data set"),
        ("{image} {config} {checkpoint} --out {note_md}", "note.md is a file, not a folder"),
        ("{folder} {config} {checkpoint} --out {folder}", "would overwrite"),
    ],
)
def test_refuses_in_one_line_and_writes_nothing(arguments, message, places, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [word.format(**places) for word in arguments.split()]
    if "--out" not in words:
        words += ["--out", places["out"]]
    assert message in refused("infer.py", words, monkeypatch, capsys)
    assert not Path(places["out"]).exists() and not Path(places["out"] + ".json").exists()
