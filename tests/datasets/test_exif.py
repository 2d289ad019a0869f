"""Boxes are in the frame in which a picture is loaded: another one is refused, with EXIF named."""

import json

import numpy as np
import pytest
from mmdet.registry import DATASETS
from PIL import Image

from mmdet_lors.datasets.exif import check_frame, frame_of, orientation
from mmdet_lors.errors import UserError

TURNED, MIRRORED = (5, 6, 7, 8), (2, 3, 4)
UNTURNED = "color_ignore_orientation"


def picture(path, turn: int, kind: str = "JPEG", size=(48, 32)):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)).save(
        path, kind, exif=exif
    )
    return path


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", TURNED)
def test_a_quarter_turn_is_told_by_the_size(turn, kind, tmp_path):
    path = picture(tmp_path / "a", turn, kind)
    assert orientation(path) == turn
    check_frame(path, 32, 48)
    check_frame(path, 32, 48, "shown")
    for frame in (None, "shown"):
        with pytest.raises(
            UserError, match=rf"image .*a is turned by its EXIF orientation {turn}: it is loaded with 3"
        ):
            check_frame(path, 48, 32, frame)
    if kind != "TIFF":
        check_frame(path, 48, 32, "stored")
    with pytest.raises(UserError, match="EXIF orientation"):
        check_frame(path, 32, 48, "stored")


@pytest.mark.parametrize(("turn", "size"), [*((turn, (48, 32)) for turn in MIRRORED), (6, (32, 32))])
def test_half_a_turn_has_to_be_stated(turn, size, tmp_path):
    path = picture(tmp_path / "a.jpg", turn, size=size)
    with pytest.raises(
        UserError, match=rf"by its EXIF orientation {turn}, .* state exif='shown' .* or load it as it is"
    ):
        check_frame(path, *size)
    check_frame(path, *size, "shown")
    check_frame(path, *size, "stored")


def test_pictures_without_a_turn_and_files_that_are_none_pass(tmp_path):
    for turn in (1, 0, 9):
        check_frame(picture(tmp_path / "a.jpg", turn), 48, 32)
    (tmp_path / "b.jpg").write_text("no picture")
    for name in ("b.jpg", "missing.jpg"):
        assert orientation(tmp_path / name) == 1
        check_frame(tmp_path / name, 48, 32)


def test_the_frame_is_what_the_pipeline_loads():
    loads, stored = dict(type="LoadImageFromFile"), dict(type="LoadImageFromFile", color_type=UNTURNED)
    assert frame_of([loads]) is None and frame_of([loads], "shown") == "shown"
    assert frame_of([stored]) == frame_of([stored], "stored") == "stored"
    for pipeline, exif in (([loads], "stored"), ([stored], "shown")):
        with pytest.raises(UserError, match=f"exif='{exif}' is not how the pipeline loads pictures: load it as it is"):
            frame_of(pipeline, exif)
    with pytest.raises(UserError, match="exif must be 'shown', 'stored' or left out, got 'turned'"):
        frame_of([loads], "turned")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("turn", "size", "fields", "good"),
    [
        (6, (32, 48), {}, True),
        (6, (48, 32), {}, False),
        (6, (48, 32), dict(color_type=UNTURNED), True),
        (6, (32, 48), dict(color_type=UNTURNED), False),
        (3, (48, 32), {}, False),
        (3, (48, 32), dict(exif="shown"), True),
        (3, (48, 32), dict(color_type=UNTURNED), True),
        (3, (48, 32), dict(color_type=UNTURNED, exif="stored"), True),
    ],
)
def test_a_data_set_of_another_frame_is_refused(turn, size, fields, good, training, tmp_path):
    picture(tmp_path / "1.jpg", turn)
    content = dict(
        images=[dict(id=1, file_name="1.jpg", width=size[0], height=size[1])],
        categories=[dict(id=1, name="cat")],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[2, 3, 20, 20], area=400, iscrowd=0)],
    )
    (tmp_path / "a.json").write_text(json.dumps(content))
    fields = dict(fields)
    load = dict(type="LoadImageFromFile", color_type=fields.pop("color_type", "color"))
    steps = [load, dict(type="LoadAnnotations", with_bbox=True), dict(type="PackDetInputs", meta_keys=("img_id",))]
    fields |= dict(metainfo=dict(classes=("cat",)), data_root=str(tmp_path), ann_file="a.json", pipeline=steps)
    data = DATASETS.build(
        dict(fields, type="CheckedCocoDataset", data_prefix=dict(img=""), test_mode=not training, serialize_data=False)
    )
    if good:
        assert tuple(data[0]["inputs"].shape[1:]) == size[::-1]
    else:
        with pytest.raises(UserError, match=f"1.jpg.*its EXIF orientation {turn}"):
            data[0]
