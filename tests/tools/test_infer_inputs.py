"""What the Inferencer is given: images in any form, from several threads; and how it names what it writes."""

import copy
import io
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch
from conftest import LORS_DIGITS, ROOT, write_random_lors
from PIL import Image

from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer
from mmdet_lors.inference.sources import find_sources

CONFIG = str(ROOT / LORS_DIGITS)


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
def picture() -> np.ndarray:
    """(H, W, 3), BGR, whose colours, rows and columns all differ."""
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **fields) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **fields)
    return file.getvalue()


def found(inferencer, source) -> dict:
    (result,) = inferencer(source)["predictions"]
    return result


def test_forms_of_one_picture_give_equal_boxes(inferencer, picture, tmp_path):
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), picture)
    expected = found(inferencer, str(path))
    assert len(expected["scores"]) == 20
    read_only = picture.copy()
    read_only.flags.writeable = False
    forms = {
        "path": path,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "PIL": Image.open(path),
        "array": picture,
        "BGRA": np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)]),
        "PIL with alpha": Image.fromarray(np.dstack([picture[..., ::-1], picture[..., 0]])),
        "not contiguous": np.asfortranarray(picture)[:, ::-1][:, ::-1],
        "read-only": read_only,
        "float of whole numbers": picture.astype(np.float32),
        "int64": picture.astype(np.int64),
        "uint16": picture.astype(np.uint16) * 257,
        "16-bit file": cv2.imencode(".png", picture.astype(np.uint16) * 257)[1].tobytes(),
        "generator": (form for form in [picture]),
        "tuple": (picture,),
    }
    for name, form in forms.items():
        assert found(inferencer, form) == expected, name


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16"])
def test_pil_images_of_other_modes_are_as_opencv_reads_their_files(mode, inferencer, picture):
    grey = Image.fromarray(picture[..., 0])
    image = {
        "LA": Image.merge("LA", (grey, grey)),
        "P": Image.fromarray(picture).convert("P"),
        "I;16": Image.fromarray(picture[..., 0].astype(np.uint16) * 257),
    }.get(mode) or grey.convert(mode)
    assert image.mode == mode
    assert found(inferencer, image) == found(inferencer, encoded(image))


def test_grey_and_bool_arrays_are_pictures(inferencer, picture):
    grey = picture[..., 0]
    expected = found(inferencer, encoded(Image.fromarray(grey)))
    assert found(inferencer, grey) == found(inferencer, grey[..., None]) == expected
    assert found(inferencer, grey > 99) == found(inferencer, np.uint8(255) * (grey > 99))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_boxes_are_in_the_frame_in_which_a_picture_is_shown(kind, orientation, inferencer, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(cv2.resize(picture[:6, :9], (90, 60)))
    data = encoded(smooth, kind, exif=exif, **(dict(lossless=True) if kind == "WEBP" else {}))
    shown = np.rot90(mmcv.imfrombytes(data, flag="color_ignore_orientation"), 2 if orientation == 3 else -1)
    shown = mmcv.imfrombytes(data) if kind == "TIFF" else shown  # which OpenCV turns in any case
    expected = found(inferencer, np.ascontiguousarray(shown))
    (tmp_path / "turned").write_bytes(data)
    for form in (tmp_path / "turned", data, Image.open(io.BytesIO(data))):
        assert found(inferencer, form) == expected
        (_, sample), *_ = inferencer.stream(form)
        assert sample.ori_shape == ((60, 90) if orientation == 3 else (90, 60))
        assert inferencer.draw(form, sample).shape[:2] == tuple(5 * side for side in sample.ori_shape)


REFUSED = {
    "float 0 to 1": (lambda p: p / np.float32(255), "from 0 to 1, not 0 to 255; convert it to uint8"),
    "float with fractions": (lambda p: p * 0.5, "not whole numbers"),
    "normalised": (lambda p: p - 99.0, "values from -99 to 156, which are not whole numbers from 0 to 255"),
    "not finite": (lambda p: p * np.nan, "not whole numbers from 0 to 255"),
    "mask of 0 and 1": (lambda p: (p > 99).astype(np.int64), "from 0 to 1, not 0 to 255"),
    "12 bits": (lambda p: p.astype(np.uint16) * 16, "uses 12 of its 16 bits"),
    "file of 12 bits": (lambda p: cv2.imencode(".png", p.astype(np.uint16) * 16)[1].tobytes(), "12 of its 16 bits"),
    "TIFF of 14 bits": (lambda p: cv2.imencode(".tiff", p.astype(np.uint16) * 64)[1].tobytes(), "14 of its 16 bits"),
    "TIFF of floats": (lambda p: cv2.imencode(".tiff", p / np.float32(255))[1].tobytes(), "from 0 to 1, not 0 to 255"),
    "PIL of 12 bits": (lambda p: Image.fromarray(p[..., 0].astype(np.uint16) * 16), "mode I;16 .* 12 of its 16 bits"),
    "batch": (lambda p: np.stack([p, p]), "give the images of a batch one by one"),
    "channels first": (lambda p: p.transpose(2, 0, 1), r"array.transpose\(1, 2, 0\)"),
    "empty": (lambda p: p[:0], r"array of shape \(0, 90, 3\) and type uint8 is not an image"),
    "objects": (lambda p: p.astype(object), "type object does not hold numbers"),
    "thin": (lambda p: np.zeros((1, 5000, 3), np.uint8), "5000 x 1 pixels, cannot be prepared for the detector"),
    "tensor": (torch.from_numpy, r"tensor.permute\(1, 2, 0\).numpy\(\)"),
    "file object": (lambda p: io.BytesIO(b"x"), r"file.read\(\)"),
    "None": (lambda p: None, "input of type NoneType cannot be read as an image"),
    "no image": (lambda p: b"no image", r"image file in memory \(8 bytes\) cannot be read as an image"),
    "no file": (lambda p: Path("none.png"), "none.png does not exist"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_picture_is_refused_in_one_line(make, message, inferencer, picture):
    picture[0, 0, :2] = 0, 255
    with pytest.raises(UserError, match=message) as refused:
        inferencer([make(picture)])
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=message):
        list(inferencer.stream(make(picture)))


def test_a_folder_stands_for_its_images_in_order(inferencer, images):
    assert [path for path, _ in inferencer.stream([Path(images[0]).parent])] == images
    assert len(inferencer(Path(images[0]).parent)["predictions"]) == len(images)


def test_workers_change_nothing(checkpoint, images, tmp_path):
    inferencer = Inferencer(CONFIG, checkpoint, "cpu", show_progress=False, skip_unreadable=True)
    thin = str(tmp_path / "thin.png")
    cv2.imwrite(thin, np.zeros((1, 5000, 3), np.uint8))
    sources = [*images[:3], "none.png", thin, Image.open(images[3]), mmcv.imread(images[4])]
    alone = list(inferencer.stream(sources, 2))
    assert "it, 5000 x 1 pixels, cannot be prepared" in inferencer.unreadable.pop(thin)
    assert inferencer.unreadable.pop("none.png") == "it does not exist"
    several = list(inferencer.stream(sources, 2, workers=2))
    assert [source for source, _ in several[:3]] == images[:3] and set(inferencer.unreadable) == {"none.png", thin}
    for (_, one), (_, two) in zip(alone, several, strict=True):
        assert torch.equal(one.pred_instances.bboxes, two.pred_instances.bboxes) and len(one.pred_instances) == 20
        assert one.img_path == two.img_path
    with pytest.raises(UserError, match="image file in memory"):
        list(inferencer.stream([images[0], b"no image"], workers=1))


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with images in it and below it, and other files."""
    for name in ("b.jpg", "a/2.png", "a/b/1.JPG", "found/a/2.png", "a/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def listed(tree: Path, *inputs: str, **options) -> list[str]:
    """The images of inputs in the folder, from it."""
    found, video = find_sources([str(tree / name) for name in inputs], **options)
    assert video is None
    return [os.path.relpath(path, tree) for path in found]


def test_folders_and_patterns_reach_folders_below(tree):
    assert listed(tree, ".") == ["a/2.png", "a/b/1.JPG", "b.jpg", "found/a/2.png"]
    assert listed(tree, ".", out=tree / "found") == ["a/2.png", "a/b/1.JPG", "b.jpg"]
    assert listed(tree, "a", "a/../b.jpg", "./b.jpg") == ["a/2.png", "a/b/1.JPG", "b.jpg"]
    assert listed(tree, "**/*.png") == ["a/2.png", "found/a/2.png"]
    assert listed(tree, "a/*") == ["a/2.png"]
    (tree / "[x].png").touch()
    assert listed(tree, "[x].png") == ["[x].png"]  # a name, not a pattern


def test_text_files_and_jsons_list_images(tree):
    (tree / "list.txt").write_text(f"b.jpg\n\n  a/2.png\r\n{tree}/a/b/1.JPG\nmissing.jpg\n")
    assert listed(tree, "list.txt") == ["b.jpg", "a/2.png", "a/b/1.JPG", "missing.jpg"]
    assert listed(tree, "list.txt", images_dir=tree / "a")[:2] == ["a/b.jpg", "a/a/2.png"]
    images = [dict(id=7, file_name="2.png"), dict(id=3, file_name="b/1.JPG")]
    (tree / "coco.json").write_text(json.dumps(dict(images=images, categories=[], annotations=[])))
    assert listed(tree, "coco.json", images_dir=tree / "a") == ["a/2.png", "a/b/1.JPG"]
    (tree / "coco.json").write_text(json.dumps(dict(images=[dict(id=7)], categories=[])))
    with pytest.raises(UserError, match=r"coco.json: images\[0\] must have a file_name"):
        listed(tree, "coco.json")


def test_unreadable_files_are_named_by_call(checkpoint, images, tmp_path):
    inferencer = Inferencer(CONFIG, checkpoint, "cpu", show_progress=False, skip_unreadable=True)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    a, b = (str(tmp_path / f"{name}.png") for name in "ab")
    first, second = inferencer([a, images[0]]), inferencer([images[0], b, images[1]])
    assert list(first["unreadable"]) == [a] and list(second["unreadable"]) == [b]
    assert len(second["predictions"]) == 2
    assert inferencer.unreadable == {a: "it cannot be read as an image", b: "it cannot be read as an image"}
    with pytest.raises(UserError):  # which is no file that might be skipped
        inferencer([images[0], np.zeros((2, 9, 9, 3), np.uint8)])


def test_threads_get_what_one_gets(inferencer, images):
    sources = [mmcv.imread(path)[: 60 + 4 * i] for i, path in enumerate(images)] * 2
    samples = [next(inferencer.stream(source))[1] for source in sources]

    def call(i: int):
        result = inferencer(sources[i], return_vis=True, pred_score_thr=0.0)
        (_, sample), *_ = inferencer.stream([sources[i]])
        return result, sample.pred_instances.bboxes, inferencer.draw(sources[i], samples[i], 0.0)

    expected = [call(i) for i in range(len(sources))]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(call, range(len(sources))))
    for (result, boxes, drawn), (result2, boxes2, drawn2) in zip(got, expected, strict=True):
        assert result["predictions"] == result2["predictions"]
        assert np.array_equal(result["visualization"][0], result2["visualization"][0])
        assert torch.equal(boxes, boxes2) and np.array_equal(drawn, drawn2)


def test_streams_can_be_interleaved(inferencer, images):
    alone = [sample.pred_instances.bboxes for _, sample in inferencer.stream(images[:3])]
    for (_, one), (_, two), boxes in zip(
        inferencer.stream(images[:3]), inferencer.stream(images[:3]), alone, strict=True
    ):
        assert torch.equal(one.pred_instances.bboxes, boxes) and torch.equal(two.pred_instances.bboxes, boxes)


def test_inferencers_are_made_in_threads(checkpoint, images):
    def make(_) -> list:
        return Inferencer(CONFIG, checkpoint, "cpu", show_progress=False)(images[0])["predictions"]

    expected = make(0)
    with ThreadPoolExecutor(4) as threads:
        assert all(got == expected for got in threads.map(make, range(8)))


def test_an_inferencer_is_copied_and_pickled(inferencer, images):
    expected = found(inferencer, images[0])
    for other in (copy.deepcopy(inferencer), pickle.loads(pickle.dumps(inferencer))):
        assert found(other, images[0]) == expected


def test_each_input_has_files_of_its_own(checkpoint, images, tmp_path):
    inferencer = Inferencer(CONFIG, checkpoint, "cpu", show_progress=False)
    paths = [tmp_path / name for name in ("cam1/0.png", "cam2/0.png", "cam2/0.jpg", "cam2/0.PNG")]
    for path, image in zip(paths, images, strict=False):
        path.parent.mkdir(exist_ok=True)
        mmcv.imwrite(mmcv.imread(image), str(path).lower() if path.suffix == ".jpg" else str(path))
    out = tmp_path / "out"
    expected = inferencer(list(map(str, paths)), out_dir=str(out), no_save_pred=False)["predictions"]
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert written == [
        "preds/cam1/0.json",
        "preds/cam2/0.PNG.json",
        "preds/cam2/0.jpg.json",
        "preds/cam2/0.json",
        "vis/cam1/0.png",
        "vis/cam2/0-2.PNG",
        "vis/cam2/0.jpg",
        "vis/cam2/0.png",
    ]
    assert json.loads((out / "preds/cam2/0.PNG.json").read_text()) == expected[3]
    # One after another, as a loop calls it; and again, which writes the same files.
    for _ in range(2):
        for path in paths[:2]:
            inferencer(str(path), out_dir=str(out / "loop"), no_save_pred=False)
    assert {path.name for path in (out / "loop").rglob("*.*")} == {"0.png", "0-2.png", "0.json", "0.png.json"}
    inferencer([mmcv.imread(images[0])] * 2, out_dir=str(out / "arrays"), no_save_pred=False)
    assert len(list((out / "arrays").rglob("*.*"))) == 4
