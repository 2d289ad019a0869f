"""Bad images and boxes in the real pipeline: replaced and counted, or refused by name; never trained on silently."""

import io
import json
import logging
import random
import signal
import time
from collections import Counter
from copy import deepcopy
from functools import cache

import cv2
import numpy as np
import pytest
import torch
from conftest import LORS_DIGITS, ROOT, load_config
from mmdet.registry import DATASETS, MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from PIL import Image
from torch.utils.data import DataLoader

from mmdet_lors.classification import ImageFolder
from mmdet_lors.datasets.annotations import read_annotations
from mmdet_lors.datasets.checks import check_dataset
from mmdet_lors.datasets.coco import _check_whole
from mmdet_lors.errors import UserError

CASES, SECONDS = 400, 20
WIDTH, HEIGHT = 48, 32
NUMBERS = np.random.default_rng(0)
PICTURE = cv2.GaussianBlur(NUMBERS.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), (5, 5), 1)
CROPS = Config.fromfile(ROOT / "configs/_base_/datasets/coco_crop-ms-480-800.py").train_dataloader.dataset.pipeline


def encoded(kind: str = ".png", picture: np.ndarray = PICTURE) -> bytes:
    return cv2.imencode(kind, picture)[1].tobytes()


def content(images: int = 8, kind: str = ".png") -> dict:
    """A data set of digits with one box per image."""
    return dict(
        images=[dict(id=i + 1, file_name=f"{i}{kind}", width=WIDTH, height=HEIGHT) for i in range(images)],
        categories=[dict(id=c + 1, name=str(c)) for c in range(10)],
        annotations=[
            dict(id=i + 1, image_id=i + 1, category_id=1 + i % 10, bbox=[5, 6, 20, 15], area=300, iscrowd=0)
            for i in range(images)
        ],
    )


def write(folder, annotations: dict | bytes, pictures: dict[str, bytes] | None = None, kind: str = ".png") -> None:
    """The data set's files; ``pictures`` differ from the good one."""
    (folder / "train").mkdir(exist_ok=True, parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    text = annotations if isinstance(annotations, bytes) else json.dumps(annotations).encode()
    (folder / "annotations/train.json").write_bytes(text)
    for i in range(8):
        (folder / f"train/{i}{kind}").write_bytes((pictures or {}).get(f"{i}{kind}", encoded(kind)))


load_once = cache(load_config)


def dataset_cfg(folder, training: bool = True, **fields) -> dict:
    cfg = load_once(LORS_DIGITS)
    cfg = deepcopy((cfg.train_dataloader if training else cfg.val_dataloader).dataset)
    cfg.update(data_root=str(folder), ann_file="annotations/train.json", data_prefix=dict(img="train/"), **fields)
    return cfg


def build(folder, training: bool = True, **fields):
    return DATASETS.build(dataset_cfg(folder, training, **fields))


@pytest.fixture
def log():
    """The messages of the run's log."""

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    lines, handler = [], Lines()
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# What an image may be instead of itself.
def images() -> dict[str, bytes]:
    png, jpeg = encoded(), encoded(".jpg")
    flipped = bytearray(png)
    flipped[60] ^= 255
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert("CMYK").save(buffer, "JPEG")
    return dict(
        empty=b"",
        text=b"no image",
        html=b"<html>404 Not Found</html>",
        header_alone=png[:33],
        cut_png=png[: len(png) // 2],
        cut_png_late=png[:-1],
        cut_jpeg=jpeg[: len(jpeg) // 2],
        cut_jpeg_late=jpeg[:-2],
        flipped_bits=bytes(flipped),
        one_pixel=encoded(picture=PICTURE[:1, :1]),
        other_size=encoded(picture=PICTURE[:20]),
        transposed=encoded(picture=np.ascontiguousarray(PICTURE.transpose(1, 0, 2))),
        long=encoded(picture=np.zeros((100, 8000, 3), np.uint8)),
        huge_header=png[:16] + b"\x7f\xff\xff\xff\x7f\xff\xff\xff" + png[24:],
        grey=encoded(picture=PICTURE[..., 0]),
        alpha=encoded(picture=np.dstack([PICTURE, PICTURE[..., :1]])),
        sixteen_bits=encoded(picture=PICTURE.astype(np.uint16) * 257),
        cmyk=buffer.getvalue(),
        trailing=jpeg + b"\0" * 100,
    )


USABLE = {"grey", "alpha", "sixteen_bits", "cmyk", "trailing"}


@pytest.mark.parametrize("name", sorted(images()))
def test_an_unusable_image_is_replaced_counted_and_logged_once(name, tmp_path, log):
    write(tmp_path, content(), {"3.png": images()[name]})
    data = build(tmp_path, max_unusable_share=0.2)
    for _ in range(2):
        sample = data[3]["data_samples"]
        assert (sample.img_id == 4) == (name in USABLE)
        assert sample.ori_shape == (HEIGHT, WIDTH)
    told = [line for line in log if "3.png cannot be used, another one is used instead" in line]
    assert len(data.unusable) == len(told) == (name not in USABLE)
    assert all("; 1 of 8 so far" in line for line in told)


@pytest.mark.parametrize("name", sorted(set(images()) - USABLE))
def test_in_validation_an_unusable_image_is_an_error_that_names_it(name, tmp_path):
    write(tmp_path, content(), {"3.png": images()[name]})
    data = build(tmp_path, training=False)
    with pytest.raises(UserError, match=r"image .*train/3.png cannot be used: ") as error:
        data[3]
    assert "\n" not in str(error.value)
    assert data[2]["data_samples"].img_id == 3


def test_the_run_fails_above_the_share(tmp_path):
    write(tmp_path, content(), {f"{i}.png": b"" for i in range(3)})
    data = build(tmp_path, max_unusable_share=0.25)
    with pytest.raises(
        UserError, match=r"3 of 8 images cannot be used, more than max_unusable_share 0.25 allows; the "
    ):
        for i in range(8):
            data[i]


def test_by_default_one_per_cent_may_be_unusable(tmp_path):
    write(tmp_path, content(), {"3.png": b""})
    data = build(tmp_path)
    with pytest.raises(
        UserError, match="1 of 8 images cannot be used, more than max_unusable_share 0.01 allows; .*3.png"
    ):
        data[3]


@pytest.mark.parametrize("share", [-0.1, 1.5, "all", None])
def test_a_share_that_is_none(share, tmp_path):
    with pytest.raises(UserError, match=r"max_unusable_share must be in \[0, 1\]"):
        build(tmp_path, max_unusable_share=share)


def test_nothing_but_unusable_images_ends(tmp_path):
    write(tmp_path, content(), {f"{i}.png": b"" for i in range(8)})
    with pytest.raises(UserError, match="31 images in a row could not be used"):
        build(tmp_path, max_unusable_share=1.0, max_refetch=30)[0]


def test_workers_share_the_count_and_raise_one_line(tmp_path):
    write(tmp_path, content(), {f"{i}.png": b"" for i in range(2)})
    settings = dict(batch_size=2, num_workers=2, collate_fn=pseudo_collate)
    data = build(tmp_path, max_unusable_share=0.25)
    assert sum(len(batch["inputs"]) for batch in DataLoader(data, **settings)) == 8
    assert len(data.unusable) == 2
    (tmp_path / "train/5.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        list(DataLoader(data, **settings))
    assert str(error.value).startswith("3 of 8 images cannot be used") and "\n" not in str(error.value)


def test_a_cut_jpeg_is_refused_whatever_the_decoder():
    # OpenCV 4.10 decodes it, with grey in place of what is missing.
    jpeg = encoded(".jpg")
    for good in (jpeg, jpeg + b"\0" * 100, encoded()):
        _check_whole(io.BytesIO(good))
    for cut in (jpeg[:-1], jpeg[:-200]):
        with pytest.raises(OSError, match="truncated"):
            _check_whole(io.BytesIO(cut))


def test_a_run_looks_into_each_file_once_whoever_loads_it(tmp_path, monkeypatch):
    write(tmp_path, content())
    data, looked = build(tmp_path), []
    list(DataLoader(data, batch_size=2, num_workers=2, collate_fn=pseudo_collate, sampler=range(4)))
    monkeypatch.setattr(data, "_check_file", lambda path, _: looked.append(path))
    for _ in range(2):
        assert all(data[i] for i in range(8))
    assert [path[-5:] for path in looked] == ["4.png", "5.png", "6.png", "7.png"]


@TRANSFORMS.register_module()
class SpoilBoxes:
    """A step that divides by zero."""

    def __call__(self, results: dict) -> dict:
        results["gt_bboxes"].tensor[:1] *= float("nan")
        return results


@TRANSFORMS.register_module()
class Fail:
    def __call__(self, results: dict) -> dict:
        raise IndexError("out of range")


@pytest.mark.parametrize(
    ("step", "reason"),
    [("SpoilBoxes", "SpoilBoxes leaves a box that is not finite"), ("Fail", "Fail: IndexError: out of range")],
)
def test_a_step_that_spoils_data_is_named(step, reason, tmp_path, log):
    write(tmp_path, content())
    pipeline = list(dataset_cfg(tmp_path).pipeline)
    with pytest.raises(UserError, match=rf"1 of 8 images cannot be used.* the last one is .*3.png: {reason}"):
        build(tmp_path, pipeline=[*pipeline[:2], dict(type=step), *pipeline[2:]])[3]
    told = [line for line in log if "3.png cannot be used" in line]
    assert len(told) == 1 and ("Traceback" in told[0]) == (step == "Fail")


def test_a_filter_that_leaves_nothing(tmp_path):
    write(tmp_path, content())
    with pytest.raises(UserError, match="filter_cfg {.*'min_size': 64} leaves none of 8 images"):
        build(tmp_path, filter_cfg=dict(min_size=64))


def test_missing_files_are_counted_before_the_run(tmp_path):
    write(tmp_path, content())
    (tmp_path / "train/3.png").unlink()
    with pytest.raises(UserError, match=r"train_dataloader: 1 of 8 images of .* do not exist, such as .*3.png"):
        check_dataset(dataset_cfg(tmp_path), "train_dataloader")
    check_dataset(dataset_cfg(tmp_path, max_unusable_share=0.2), "train_dataloader")
    with pytest.raises(UserError, match="1 of 8 images"):
        check_dataset(dataset_cfg(tmp_path, training=False, max_unusable_share=0.2), "val_dataloader")


def test_pictures_of_classes_are_replaced_too(tmp_path):
    for name in ("train/a/0.png", "train/a/1.png", "train/b/2.png", "val/a/0.png", "val/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.endswith("1.png") else encoded())
    train = ImageFolder(str(tmp_path), "train", dict(input_size=8, is_training=True), max_unusable_share=0.4)
    assert train[1]["inputs"].shape == (3, 8, 8) and len(train.unusable) == 1
    train = ImageFolder(str(tmp_path), "train", dict(input_size=8, is_training=True))
    with pytest.raises(UserError, match="1 of 3 images cannot be used, .*train/a/1.png"):
        train[1]
    with pytest.raises(UserError, match=r"image .*val/b/1.png cannot be used: UnidentifiedImageError"):
        ImageFolder(str(tmp_path), "val", dict(input_size=8))[1]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (100, 8000), (8000, 100)])
def test_images_of_odd_shapes_train(height, width, tmp_path):
    odd, crowd = content(), dict(iscrowd=1)
    odd["images"][3].update(width=width, height=height)
    odd["annotations"][3].update(bbox=[0, 0, width, height], area=width * height)
    odd["annotations"][4].update(crowd)  # an image of crowds alone
    del odd["annotations"][5]  # and one of nothing
    write(tmp_path, odd, {"3.png": encoded(picture=np.full((height, width, 3), 99, np.uint8))})
    torch.manual_seed(0)
    for pipeline in (None, CROPS):
        data = build(tmp_path, **({} if pipeline is None else dict(pipeline=pipeline)))
        batch = pseudo_collate([data[i] for i in (3, 4, 5)])
        assert [sample.img_id for sample in batch["data_samples"]] == [4, 5, 6] and len(data.unusable) == 0
        assert [len(sample.gt_instances) for sample in batch["data_samples"]] == [batch_boxes(batch), 0, 0]
        if pipeline is None:
            model = MODELS.build(load_config(LORS_DIGITS).model)
            model.init_weights()
            loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
            loss.backward()
            assert torch.isfinite(loss)
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def batch_boxes(batch: dict) -> int:
    """1, or 0 where a random crop missed the box."""
    return min(1, len(batch["data_samples"][0].gt_instances))


ODD = [None, True, "", "x", [], {}, [1], -1, 0, 0.5, 1e300, 10**400, float("nan"), float("inf"), -float("inf")]
ODD += ["1", [1, 2, 3, 4], "\0", "../../x", 2**63, -(2**70)]


def malformed(random_: random.Random) -> tuple[str, dict | bytes, dict[str, bytes]]:
    """(kind, annotation file, pictures) of a data set with one to three things wrong."""
    kind = random_.choice(["value", "value", "missing", "row", "duplicate", "list", "boxes", "bytes", "cut", "image"])
    data, pictures = content(), {}
    for _ in range(random_.randint(1, 3)):
        table = random_.choice(["images", "annotations", "annotations", "categories"])
        rows = data[table]
        row = random_.randrange(len(rows)) if isinstance(rows, list) and rows else None
        if kind == "list":
            data[table] = random_.choice([*ODD, {"a": 1}])
        elif kind == "image":
            pictures[f"{random_.randrange(8)}.png"] = random_.choice(list(images().values()))
        elif row is None or not isinstance(rows[row], dict):
            continue
        elif kind == "value":
            rows[row][random_.choice(list(rows[row]))] = random_.choice(ODD)
        elif kind == "missing":
            rows[row].pop(random_.choice(list(rows[row])))
        elif kind == "row":
            rows[row] = random_.choice(ODD)
        elif kind == "duplicate":
            rows.append(deepcopy(rows[row]))
        elif kind == "boxes":
            box = random_.choice(data["annotations"])["bbox"]
            box[random_.randrange(4)] = random_.choice([-5, -0.2, 0, 0.5, 47, 60, 1e9, *ODD])
    if kind not in ("bytes", "cut"):
        return kind, data, pictures
    text = bytearray(json.dumps(data).encode())
    if kind == "cut":
        return kind, bytes(text[: random_.randrange(len(text))]), pictures
    for _ in range(random_.randint(1, 4)):
        text[random_.randrange(len(text))] = random_.randrange(256)
    return kind, bytes(text), pictures


def outcome(folder, training: bool) -> str:
    """Through the check, the data set and its pipeline: 'refused', 'skipped' or 'unharmed'."""
    fields = dict(max_unusable_share=0.5) if training else {}
    fields["serialize_data"] = False  # which would collect garbage for every case
    try:
        check_dataset(dataset_cfg(folder, training, **fields), "train_dataloader")
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1000
        # A run that was not checked before refuses it, too: the file when it loads it, an image when it is its turn.
        with pytest.raises(UserError):
            data = build(folder, training, **fields)
            assert "not exist" in message, f"read in spite of: {message}"
            [data[i] for i in range(len(data))]
        return "refused"
    data = build(folder, training, **fields)  # what the check lets pass is read
    try:
        samples = [data[i]["data_samples"] for i in range(len(data))]
    except UserError as error:
        assert "cannot be used" in str(error) and "\n" not in str(error)
        return "refused"
    for sample in samples:
        boxes, (height, width) = sample.gt_instances.bboxes.tensor, sample.img_shape
        limit = boxes.new_tensor([width, height, width, height])
        assert torch.isfinite(boxes).all()
        assert not training or ((boxes >= 0) & (boxes <= limit)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((sample.gt_instances.labels >= 0) & (sample.gt_instances.labels < 10)).all()
    whole = read_annotations(folder / "annotations/train.json") == content()
    return "unharmed" if whole and not len(data.unusable) else "skipped"


def test_malformed_data_is_refused_or_skipped_and_never_hangs(tmp_path):
    def hang(*_):
        raise TimeoutError(f"case {case} takes longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    kinds, start = Counter(), time.perf_counter()
    for case in range(CASES):
        random_ = random.Random(case)
        kind, annotations, pictures = malformed(random_)
        write(tmp_path / str(case), annotations, pictures)
        signal.alarm(SECONDS)
        try:
            kinds[kind, outcome(tmp_path / str(case), training=case % 4 > 0)] += 1
        except Exception as error:
            raise AssertionError(f"case {case} ({kind})") from error
        finally:
            signal.alarm(0)
    print(f"{sum(kinds.values())} cases in {time.perf_counter() - start:.0f} s: {dict(sorted(kinds.items()))}")
    totals = Counter()
    for (_, ended), count in kinds.items():
        totals[ended] += count
    assert sum(totals.values()) == CASES >= 200
    assert totals["refused"] > 100 and totals["skipped"] > 20
