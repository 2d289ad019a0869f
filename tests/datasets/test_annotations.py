"""Annotation files: what cannot be right is refused by name, what COCO itself contains is skipped and counted."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from mmdet_lors.datasets.annotations import check_annotations, class_names, read_annotations
from mmdet_lors.errors import UserError

PATH = Path("train.json")
CLASSES = ("cat", "dog")
GOOD = dict(
    images=[dict(id=i, file_name=f"{i}.png", width=100, height=80) for i in (1, 2, 3)],
    categories=[dict(id=7, name="cat"), dict(id=9, name="dog")],
    annotations=[
        dict(id=i + 1, image_id=1 + i % 3, category_id=7 + 2 * (i % 2), bbox=[10, 10, 20.5, 30], area=615, iscrowd=0)
        for i in range(6)
    ],
)


def check(*changes, evaluated=False) -> list[str]:
    """The check of GOOD with (list, row, field, value) changed."""
    content = deepcopy(GOOD)
    for name, row, field, value in changes:
        if value is KeyError:
            del content[name][row][field]
        else:
            content[name][row][field] = value
    return check_annotations(content, PATH, CLASSES, evaluated)


def test_a_good_file_has_nothing_to_say():
    assert check() == [] and check(evaluated=True) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("annotations", 3, "bbox", [1, float("nan"), 2, 3]),
            "annotations[3] (id 4) has bbox [1, nan, 2, 3], which is",
        ),
        (("annotations", 3, "bbox", [1, 2, float("inf"), 3]), "has bbox [1, 2, inf, 3], which is not finite"),
        (("annotations", 3, "bbox", [1, 2, 1e39, 3]), "which is not finite"),  # infinite in float32
        (("annotations", 3, "bbox", [1, 2, 10**400, 3]), "which is not finite"),
        (("annotations", 3, "bbox", [30, 40, -10, 5]), "[30, 40, -10, 5] of negative size; it must be [x, y, width"),
        (("annotations", 3, "bbox", [1, 2, 3]), "has bbox [1, 2, 3], which is not a list of 4 numbers"),
        (("annotations", 3, "bbox", [1, 2, 3, "4"]), "which is not a list of 4 numbers"),
        (("annotations", 3, "bbox", [1, 2, 3, True]), "which is not a list of 4 numbers"),
        (("annotations", 3, "bbox", None), "has bbox None, which is not a list of 4 numbers"),
        (("annotations", 3, "bbox", KeyError), "annotations[3] (id 4) has no bbox"),
        (("annotations", 3, "area", KeyError), "has no area"),
        (("annotations", 3, "area", float("nan")), "has area nan, which is not finite"),
        (("annotations", 3, "area", "9"), "has area '9', which is not a number"),
        (("annotations", 3, "id", KeyError), "annotations[3] has no id"),
        (("annotations", 3, "id", 5), "annotations[3] (id 5) shares its id with another one (2 such entries)"),
        (("annotations", 3, "id", "4"), "annotations[3] (id '4') has id '4', which is not a whole number"),
        (("annotations", 3, "id", 4.0), "annotations[3] has id 4.0, which is not a whole number"),
        (("annotations", 3, "id", True), "has id True, which is not a whole number"),
        (("annotations", 3, "id", -4), "has id -4; it must be a whole number from"),
        (("annotations", 3, "id", 2**63), "has id 9223372036854775808; it must be a whole number from"),
        (("annotations", 3, "category_id", 8), "has category_id 8, which no category has"),
        (("annotations", 3, "category_id", None), "has category_id None, which is not a whole number"),
        (("annotations", 3, "image_id", KeyError), "has no image_id"),
        (("annotations", 3, "iscrowd", "no"), "has iscrowd 'no', which is not 0 or 1"),
        (("annotations", 3, "iscrowd", 0.5), "has iscrowd 0.5, which is not 0 or 1"),
        (("annotations", 3, "iscrowd", float("nan")), "has iscrowd nan, which is not 0 or 1"),
        (("annotations", 3, "ignore", 2), "has ignore 2, which is not 0 or 1"),
        (("images", 1, "id", 1), "images[0] (id 1) shares its id with another one (2 such entries)"),
        (("images", 1, "id", KeyError), "images[1] has no id"),
        (("images", 1, "id", "2"), "images[1] (id '2') has id '2', which is not a whole number"),
        (("images", 1, "id", -2), "has id -2; it must be a whole number from 0"),
        (("images", 1, "id", 2**64), "it must be a whole number from 0"),
        (("images", 1, "width", 0), "images[1] (id 2) has width 0; it must be 1 or more pixels"),
        (("images", 1, "height", float("nan")), "has height nan, which is not finite"),
        (("images", 1, "height", KeyError), "has no height"),
        (("images", 1, "file_name", KeyError), "has no file_name"),
        (("images", 1, "file_name", 5), "has file_name 5, which is not a file's name"),
        (("images", 1, "file_name", " "), "has no usable file_name"),
        (("categories", 1, "id", 7), "categories[0] (id 7) shares its id with another one"),
        (("categories", 1, "id", "9"), "categories[1] (id '9') has id '9', which is not a whole number"),
        (("categories", 1, "id", -1), "has id -1; it must be a whole number from 0"),
        (("categories", 1, "name", "cat"), "shares the name 'cat' with another"),
        (("categories", 1, "name", KeyError), "has no name"),
        (("categories", 1, "name", "bird"), "has no category 'dog' of the config's 2 classes; it has 'cat', 'bird'"),
    ],
)
@pytest.mark.parametrize("evaluated", [False, True])
def test_refused(change, message, evaluated):
    with pytest.raises(UserError) as refused:
        check(change, evaluated=evaluated)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_lists_that_are_none(name):
    for value, message in ((None, "is a NoneType, not a list"), ([1], f"{name}[0] is not an object with named fields")):
        with pytest.raises(UserError) as refused:
            check_annotations({**deepcopy(GOOD), name: value}, PATH)
        assert message in str(refused.value)


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_empty_lists(name):
    with pytest.raises(UserError, match=f"train.json has no {name}"):
        check_annotations({**deepcopy(GOOD), name: []}, PATH)


def test_categories_in_another_order_than_the_classes():
    # mmdet gives labels in the file's order: the data would be trained under each other's names.
    with pytest.raises(UserError, match="has category 'cat' where the config's classes have 'dog'"):
        check_annotations(deepcopy(GOOD), PATH, ("dog", "cat"))
    assert check_annotations(deepcopy(GOOD), PATH, ("dog",)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("bbox", [10, 10, 0, 5])], "1 of 6 annotations have a box less than 1 pixel wide or high"),
        (
            [("bbox", [10, 10, 5, 0.5])],
            "have a box less than 1 pixel wide or high, or of no area: skipped; first: annotations[3]",
        ),
        ([("area", 0)], "or of no area: skipped"),
        ([("bbox", [200, 10, 5, 5])], "1 of 6 annotations have a box outside their image: skipped"),
        ([("bbox", [90, 10, 20, 5])], "1 of 6 annotations have a box that extends beyond their image: clipped"),
        ([("image_id", 99)], "1 of 6 annotations are for images that the file does not list: skipped"),
    ],
)
def test_skipped_and_counted(changes, message):
    lines = check(*[("annotations", 3, *change) for change in changes])
    assert len(lines) == 1 and message in lines[0] and "(id 4)" in lines[0]


def test_a_box_one_pixel_outside_is_nothing_to_say():
    assert check(("annotations", 0, "bbox", [-1, 10, 20, 30]), ("annotations", 1, "bbox", [80, 50, 20.9, 30.9])) == []


def test_boxes_of_two_corners_are_refused():
    corners = [("annotations", i, "bbox", [60, 50, 90, 75]) for i in range(6)]
    with pytest.raises(UserError, match=r"extends beyond its image, as do more than 50% of all; it must be \[x, y, wi"):
        check(*corners)


def test_images_with_crowds_alone_are_counted():
    lines = check(("annotations", 0, "iscrowd", 1), ("annotations", 3, "iscrowd", 1))
    assert lines == [
        "train.json: 1 images have only crowd boxes and train as images without objects; first: images[0] (id 1)"
    ]


def test_nothing_to_learn_from():
    with pytest.raises(UserError, match="has no box to learn from: of 6 annotations .* and 6 crowds"):
        check(*[("annotations", i, "iscrowd", 1) for i in range(6)])


def test_evaluation_needs_iscrowd_and_no_annotations():
    assert check(("annotations", 3, "iscrowd", KeyError)) == []
    with pytest.raises(UserError, match=r"annotations\[3\] \(id 4\) has no iscrowd"):
        check(("annotations", 3, "iscrowd", KeyError), evaluated=True)
    test_dev = {key: value for key, value in GOOD.items() if key != "annotations"}
    assert check_annotations(test_dev, PATH, CLASSES, evaluated=True) == []


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf{}", b'"\xff"', b"[" * 100_000, b'{"images": ' + b"9" * 5000 + b"}", '{"a": 1}'.encode("utf-16")],
)
def test_files_that_are_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json is not JSON"):
        read_annotations(tmp_path / "a.json")


def test_annotation_id_0_is_no_match_for_pycocotools():
    with pytest.raises(UserError, match=r"annotations\[3\] \(id 0\) has id 0; it must be .* from 1 .*; count annotat"):
        check(("annotations", 3, "id", 0), evaluated=True)
    assert check(("annotations", 3, "id", 0)) == []  # nothing reads it in training
    ids = [("images", 0, "id", 0), *(("annotations", i, "image_id", 0) for i in (0, 3))]
    assert check(*ids, evaluated=True) == []


def test_what_says_ignore_is_not_trained_on_but_evaluated():
    (line,) = check(("annotations", 3, "ignore", 1))
    assert "1 of 6 annotations are marked 'ignore': skipped; first: annotations[3] (id 4)" in line
    (line,) = check(("annotations", 3, "ignore", True), evaluated=True)
    assert "are marked 'ignore': not loaded, but counted by COCO's evaluation" in line
    with pytest.raises(UserError, match="has no box to learn from: of 6 annotations .* 6 to be ignored"):
        check(*[("annotations", i, "ignore", 1) for i in range(6)])


@pytest.mark.parametrize("area", [-1, 1.1e10])
def test_areas_that_pycocotools_leaves_out(area):
    with pytest.raises(UserError, match="COCO's evaluation counts objects of 0 to 1e[+]10 pixels"):
        check(("annotations", 3, "area", area), evaluated=True)
    check(("annotations", 3, "area", area))


@pytest.mark.parametrize(
    "mask",
    [
        None,
        [],
        [[]],
        [[1, 2, 3, 4]],  # which pycocotools takes for a box
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, float("nan")]],
        dict(counts=[0, 8000]),
        dict(size=[100, 80], counts=[0, 8000]),  # width first
        "mask",
    ],
)
def test_masks_that_pycocotools_cannot_read_are_refused_where_they_are_evaluated(mask):
    content = deepcopy(GOOD)
    for row in content["annotations"]:
        row["segmentation"] = [[10, 10, 30, 10, 30, 40]]
    content["annotations"][0]["segmentation"] = dict(size=[80, 100], counts=[0, 8000])
    assert check_annotations(content, PATH, CLASSES, evaluated=True, masks=True) == []
    content["annotations"][3]["segmentation"] = mask
    assert check_annotations(content, PATH, CLASSES, evaluated=True) == []
    with pytest.raises(UserError, match=r"annotations\[3\] .* is neither a list of polygons .* nor run lengths of its"):
        check_annotations(content, PATH, CLASSES, evaluated=True, masks=True)


def test_names_of_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert class_names(str(tmp_path / "classes.txt")) == class_names(["cat", "dog"]) == CLASSES
    for classes, message in (
        ("digit", r"classes 'digit' is a single string .* write \('digit',\), with a comma"),
        (str(tmp_path), "is a single string and not a file of class names"),
        (("cat", "dog", "cat"), "has 'cat' 2 times among its 3"),
        ((), "must be the names of one class or more"),
        (("cat", 1), "must be the names of one class or more, got 1"),
        (5, "must be the names of one class or more, got 5"),
    ):
        with pytest.raises(UserError, match=message):
            class_names(classes)


def test_json_of_good_content_can_be_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert read_annotations(tmp_path / "a.json") == GOOD
