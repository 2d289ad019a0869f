"""An evaluator judges the data that its loop loads, or is refused before the first image."""

import gc
import json
from copy import deepcopy
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset, MultiImageMixDataset
from mmdet.evaluation import CocoMetric
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.evaluator import Evaluator
from torch.utils.data import Subset

from mmdet_lors.classification import ImageFolder
from mmdet_lors.datasets import CheckedCocoDataset, CheckedCocoMetric, EvaluatedDataHook
from mmdet_lors.datasets import files as files_module
from mmdet_lors.datasets.evaluation import use_evaluated_data_hook
from mmdet_lors.datasets.files import annotation_file, keep, release
from mmdet_lors.errors import UserError

CLASSES = dict(classes=("cat", "dog"))
LOAD = [dict(type="LoadImageFromFile"), dict(type="PackDetInputs", meta_keys=("img_id",))]


def content(images=range(1, 5), categories=((1, "cat"), (2, "dog"))) -> dict:
    return dict(
        images=[dict(id=i, file_name=f"{i}.png", width=48, height=32) for i in images],
        categories=[dict(id=i, name=name) for i, name in categories],
        annotations=[
            dict(id=i, image_id=i, category_id=1 + i % 2, bbox=[5, 6, 20, 15], area=300, iscrowd=0) for i in images
        ],
    )


@pytest.fixture(autouse=True)
def _released():
    yield
    release()


@pytest.fixture
def write(tmp_path):
    """Writes an annotation file, and its pictures."""

    def write(name: str, data: dict) -> str:
        (tmp_path / name).write_text(json.dumps(data))
        for row in data["images"]:
            cv2.imwrite(str(tmp_path / row["file_name"]), np.zeros((32, 48, 3), np.uint8))
        return str(tmp_path / name)

    return write


def load(file: str, kind: type = CheckedCocoDataset, **fields) -> CocoDataset:
    fields = dict(dict(test_mode=True, serialize_data=False, pipeline=LOAD), **fields)
    folder = file.rpartition("/")[0]
    return kind(ann_file=file, metainfo=CLASSES, data_prefix=dict(img=folder), **fields)


def begin(dataset, *metrics, split: str = "val") -> None:
    """What the hook does before a loop of this data set and these metrics."""
    evaluator = Evaluator(list(metrics))
    evaluator.dataset_meta = CLASSES
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset), evaluator=evaluator)
    hook = EvaluatedDataHook()
    runner = SimpleNamespace(val_loop=loop, test_loop=loop)
    dict(train=hook.before_train, val=hook.before_val, test=hook.before_test)[split](runner)


def other(change: str) -> dict:
    """The data set with something else in it."""
    data = content()
    if change == "fewer images":
        data = content(range(1, 4))
    elif change == "ids of images":
        data = content(range(2, 6))
    elif change == "names of images":
        data["images"][2]["file_name"] = "another.png"
    elif change == "names of categories":
        data["categories"][0]["name"] = "bird"
    elif change == "ids of categories":
        data["categories"] = [dict(id=2, name="cat"), dict(id=1, name="dog")]
    elif change == "order of categories":
        data["categories"].reverse()
    elif change == "another category":
        data["categories"].append(dict(id=3, name="bird"))
    elif change == "fewer annotations":
        data["annotations"].pop()
    else:
        data["annotations"][1].update({"box": dict(bbox=[5, 6, 20, 16]), "crowd": dict(iscrowd=1)}[change])
    return data


CHANGES = {
    "fewer images": "the first has 3 images, the second 4",
    "ids of images": "image id 1 is missing in the first and '1.png' in the second",
    "names of images": "image id 3 is 'another.png' in the first and '3.png' in the second",
    "names of categories": "the first has 'bird' as category id 1, the second 'cat' as id 1",
    "ids of categories": "the first has 'dog' as category id 1, the second 'cat' as id 1",
    "order of categories": "the first lists the categories in another order",
    "another category": "the first has 3 categories, the second 2",
    "fewer annotations": r"annotations of image id 4 \(4.png\) differ",
    "box": r"annotations of image id 2 \(2.png\) differ",
    "crowd": r"annotations of image id 2 \(2.png\) differ",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [CheckedCocoMetric, CocoMetric])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_file_of_other_data_is_refused_with_both_names(change, kind, split, write):
    data, metric = load(write("val.json", content())), kind(write("other.json", other(change)))
    with pytest.raises(UserError, match=CHANGES[change]) as refused:
        begin(data, CheckedCocoMetric(data.ann_file), metric, split=split)
    named = "other.json" if kind is CheckedCocoMetric else "an annotation file"
    where = "test_evaluator" if split == "test" else "val_evaluator"
    assert f"{where} evaluates against " in str(refused.value) and named in str(refused.value)
    assert "val.json" in str(refused.value) and "\n" not in str(refused.value)


def test_another_file_of_the_same_content_is_fine(write):
    data = content()
    for row in data["annotations"]:
        row["id"] += 10
    data["images"].reverse()
    data["annotations"].reverse()
    for kind in (CheckedCocoMetric, CocoMetric):
        begin(load(write("val.json", content())), kind(write("copy.json", data)))
        begin(load(write("val.json", content()), CocoDataset), kind(write("val.json", content())))


def test_classes_in_another_order_than_the_data_set_maps_them(write):
    file = write("val.json", content(categories=((2, "cat"), (1, "dog"))))
    with pytest.raises(UserError, match="the first lists the categories in another order"):
        begin(load(file), CocoMetric(file, sort_categories=True))
    with pytest.raises(UserError, match="CocoMetric mixes up the classes' figures .* use type='CheckedCocoMetric"):
        begin(load(file), CocoMetric(file, classwise=True))
    begin(load(file), CocoMetric(file), CheckedCocoMetric(file, classwise=True))


def parts(data: CocoDataset) -> dict:
    """Wrappers and the images that they leave."""
    return dict(
        whole=(data, [1, 2, 3, 4]),
        subset=(Subset(data, [3, 0]), [4, 1]),
        indices=(load(data.ann_file, indices=[2, 1]), [3, 2]),
        first=(load(data.ann_file, indices=3), [1, 2, 3]),
        once=(RepeatDataset(data, 1), [1, 2, 3, 4]),
        joined=(ConcatDataset([load(data.ann_file, indices=[1]), load(data.ann_file, indices=[0])]), None),
    )


@pytest.mark.parametrize("part", ["whole", "subset", "indices", "first", "once", "joined"])
def test_a_part_is_evaluated_on_that_part(part, write):
    file = write("val.json", content())
    dataset, ids = parts(load(file))[part]
    if ids is None:  # two data sets of one file: their ids overlap
        with pytest.raises(UserError, match="val.json and .*val.json both have image id 1; evaluate data sets one by"):
            begin(dataset, CocoMetric(file))
        return
    metric = CocoMetric(file)
    begin(dataset, metric, CheckedCocoMetric(file))
    assert (metric.img_ids or list(range(1, 5))) == ids


def test_a_filter_that_test_mode_would_switch_off(write):
    data = content()
    del data["annotations"][1]
    file = write("val.json", data)
    metric = CocoMetric(file)
    begin(load(file, test_mode=False, filter_cfg=dict(filter_empty_gt=True)), metric)
    assert metric.img_ids == [1, 3, 4]


@pytest.mark.parametrize(
    "wrap", [lambda d: RepeatDataset(d, 2), lambda d: ClassBalancedDataset(d, 1.0), lambda d: Subset(d, [1, 1])]
)
def test_images_that_would_count_twice_are_refused(wrap, write):
    data = content()
    for row in data["annotations"][:3]:  # the other class is rare
        row["category_id"] = 2
    file = write("val.json", data)
    with pytest.raises(UserError, match=r"val_dataloader has image id \d \d times: each must be evaluated once"):
        begin(wrap(load(file)), CheckedCocoMetric(file))


def test_mixed_images_cannot_be_matched(write):
    file = write("val.json", content())
    with pytest.raises(UserError, match="does not match what val_dataloader's MultiImageMixDataset yields"):
        begin(MultiImageMixDataset(load(file), []), CheckedCocoMetric(file))


def test_several_data_sets(write):
    both = content(range(1, 7))
    first, second = write("a.json", content()), write("b.json", content((5, 6)))
    joined = ConcatDataset([load(first), load(second)])
    begin(joined, CheckedCocoMetric(write("both.json", both)))
    for file in (first, second):
        with pytest.raises(UserError, match=r"a.json, .*b.json: the first has \d images, the second 6"):
            begin(joined, CheckedCocoMetric(file))
    with pytest.raises(UserError, match="a.json and .*c.json both have image id 4"):
        begin(ConcatDataset([load(first), load(write("c.json", content((4, 5))))]), CheckedCocoMetric(first))


@pytest.mark.parametrize("kind", [CheckedCocoDataset, CocoDataset])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_bad_images_are_errors_where_data_are_evaluated_whatever_test_mode_says(kind, split, write, tmp_path):
    file = write("val.json", content())
    (tmp_path / "3.png").write_bytes(b"")
    data = load(file, kind, test_mode=False, **(dict(max_unusable_share=1.0) if kind is CheckedCocoDataset else {}))
    assert data[2] if kind is CheckedCocoDataset else True  # another one in its place
    begin(RepeatDataset(data, 1), CheckedCocoMetric(file), split=split)
    with pytest.raises(Exception, match="3.png cannot be used: it is empty" if kind is CheckedCocoDataset else ""):
        data[2]
    assert data.test_mode


def test_bad_pictures_of_classes_too(tmp_path):
    (tmp_path / "val/a").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "val/a/0.png"), np.zeros((32, 48, 3), np.uint8))
    (tmp_path / "val/a/1.png").write_bytes(b"")
    data = ImageFolder(str(tmp_path), "val", dict(input_size=8, is_training=True), max_unusable_share=1.0)
    assert data[1]["inputs"].shape == (3, 8, 8)
    begin(data)
    with pytest.raises(UserError, match="a/1.png cannot be used"):
        data[1]


def test_each_file_is_read_once_while_a_run_is_made(write, monkeypatch):
    read = []
    monkeypatch.setattr(files_module, "read_annotations", lambda path: read.append(path) or deepcopy(content()))
    file = write("val.json", content())
    keep()
    for _ in range(2):
        begun = load(file), CheckedCocoMetric(file)
    begin(*begun)
    assert len(read) == 1
    load(file)  # the run has begun, and nothing is kept
    assert len(read) == 2
    keep()
    assert annotation_file(file) is annotation_file(file)
    write("val.json", dict(content(), info="longer"))
    assert len(read) == 3 and annotation_file(file) is annotation_file(file) and len(read) == 4


def test_python_collects_garbage_of_everything_once_the_run_has_begun(write):
    file = write("val.json", content())
    keep()
    annotation_file(file)
    assert gc.get_freeze_count()
    release()
    assert not gc.get_freeze_count()


def test_a_run_without_our_runtime_gets_the_hook():
    config = dict(default_hooks=dict(timer=dict(type="IterTimerHook"), logger=None))
    for _ in range(2):
        use_evaluated_data_hook(config)
        assert config["default_hooks"]["evaluated_data"] == dict(type="mmdet.EvaluatedDataHook")
    named = dict(default_hooks=dict(mine=dict(type=EvaluatedDataHook)))
    use_evaluated_data_hook(named)
    assert list(named["default_hooks"]) == ["mine"]
