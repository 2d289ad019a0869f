"""COCO's figures, of all classes and of each, against an independent computation: the same, or refused."""

import json
from collections import Counter
from collections.abc import Iterable
from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric

from mmdet_lors.datasets import CheckedCocoDataset, CheckedCocoMetric
from mmdet_lors.datasets.evaluation import compare
from mmdet_lors.errors import UserError

SIDE = 128
THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = dict(all=(0, 1e10), s=(0, 32**2), m=(32**2, 96**2), l=(96**2, 1e10))
NAMES = "abc"
LOADED = dict(data_prefix=dict(img=""), test_mode=True, serialize_data=False)


def iou(detected: list, true: list, crowd: bool) -> float:
    """Of boxes [x, y, width, height]; with a crowd the share of the detected box that lies in it."""
    (x, y, w, h), (u, v, a, b) = detected, true
    shared = max(0, min(x + w, u + a) - max(x, u)) * max(0, min(y + h, v + b) - max(y, v))
    return shared / (w * h if crowd else w * h + a * b - shared) if shared else 0.0


def average_precision(truth: list[dict], detections: list[tuple], threshold: float, area: tuple) -> float | None:
    """COCO's definition, for one class: detections are (image, box, score); None without an object."""

    def outside(size: float) -> bool:
        return not area[0] <= size <= area[1]

    scored, objects = [], 0
    for image in sorted({row["image_id"] for row in truth} | {image for image, _, _ in detections}):
        rows = [row for row in truth if row["image_id"] == image]
        counted = [not row["iscrowd"] and not outside(row["area"]) for row in rows]
        objects += sum(counted)
        matched = [False] * len(rows)
        for _, box, score in sorted((d for d in detections if d[0] == image), key=lambda d: -d[2])[:100]:
            found = None
            for wanted in (True, False):  # objects that do not count are matched only where no other one is
                best = threshold
                for i, row in enumerate(rows):
                    free = counted[i] == wanted and (not matched[i] or row["iscrowd"])
                    if free and (overlap := iou(box, row["bbox"], row["iscrowd"])) >= best:
                        best, found = overlap, i
                if found is not None:
                    break
            if found is not None:
                matched[found] = True
            ignored = outside(box[2] * box[3]) if found is None else not counted[found]
            if not ignored:
                scored.append((score, found is not None))
    if not objects:
        return None
    hits = np.array([hit for _, hit in sorted(scored, key=lambda s: -s[0])], float)
    recall, precision = hits.cumsum() / objects, hits.cumsum() / np.arange(1, len(hits) + 1)
    return float(np.mean([max(precision[recall >= level], default=0.0) for level in np.linspace(0, 1, 101)]))


def expected(content: dict, detections: list[tuple], ids: list[int]) -> tuple[list[float], dict[str, float]]:
    """COCO's six figures, and AP by class; detections are (image, label, box, score)."""
    present = {row["id"] for row in content["images"]}
    table = {}
    for label, category in enumerate(ids):
        truth = [r for r in content["annotations"] if r["category_id"] == category and r["image_id"] in present]
        found = [(image, box, score) for image, its, box, score in detections if its == label]
        for name, area in AREAS.items():
            for threshold in THRESHOLDS:
                table[label, name, round(threshold, 2)] = average_precision(truth, found, threshold, area)

    def mean(labels: Iterable[int], area: str = "all", thresholds: Iterable[float] = THRESHOLDS) -> float:
        values = [table[label, area, round(t, 2)] for label in labels for t in thresholds]
        return float(np.mean([v for v in values if v is not None])) if any(v is not None for v in values) else -1.0

    labels = range(len(ids))
    figures = [mean(labels), mean(labels, thresholds=[0.5]), mean(labels, thresholds=[0.75])]
    figures += [mean(labels, area) for area in "sml"]
    return figures, {NAMES[label]: mean([label]) for label in labels}


BOX = st.builds(
    lambda x, y, w, h: [x, y, w, h], st.integers(-2, 60), st.integers(-2, 60), st.integers(0, 70), st.integers(1, 60)
)
ODD_IDS = ["twice", "text", "whole float", "negative", "huge", "from 0"]


@st.composite
def data_sets(draw) -> tuple[dict, list[tuple]]:
    """(annotation file, detections), not always in order."""
    some_ids = st.integers(0, 9) | st.just(2**62)
    images, categories = (draw(st.lists(some_ids, min_size=1, max_size=3, unique=True)) for _ in range(2))
    rows = []
    for _ in range(draw(st.integers(0, 6))):
        box = draw(BOX)
        row = dict(
            image_id=draw(st.sampled_from([*images, *images, 77])), category_id=draw(st.sampled_from(categories))
        )
        row |= dict(bbox=box, area=draw(st.sampled_from([box[2] * box[3]] * 5 + [300] * 3 + [5000] * 3 + [-1])))
        row |= dict(iscrowd=draw(st.sampled_from([0, 0, 0, 1])), segmentation=[])
        rows.append(row | draw(st.sampled_from([{}, {}, dict(ignore=1)])))
    ids = draw(st.permutations(range(1, len(rows) + 1)))
    odd = draw(st.sampled_from([None] * 18 + ODD_IDS))
    for row, number in zip(rows, ids, strict=True):
        row["id"] = {"from 0": number - 1, "text": str(number), "whole float": float(number)}.get(odd, number)
    if rows and odd in ("twice", "negative", "huge"):
        rows[0]["id"] = dict(twice=rows[-1]["id"], negative=-3, huge=2**64)[odd]
    content = dict(
        images=[dict(id=i, file_name=f"{i}.png", width=SIDE, height=SIDE) for i in images],
        categories=[dict(id=category, name=NAMES[place]) for place, category in enumerate(categories)],
        annotations=rows,
    )
    found = []
    for image in images:
        for _ in range(draw(st.integers(0, 5))):
            true = [row["bbox"] for row in rows if row["image_id"] == image]
            box = list(draw(st.sampled_from(true) if true else BOX))
            box[2] += draw(st.integers(0, 9))
            found.append((image, draw(st.integers(0, len(categories) - 1)), box, draw(st.integers(1, 16)) / 16))
    return content, found


def evaluate(metric: CocoMetric, classes: str, images: list[int], detections: list[tuple]) -> dict:
    """The metric's figures, as a loop gets them."""
    metric.dataset_meta = dict(classes=tuple(classes))
    for image in images:
        rows = [d for d in detections if d[0] == image]
        boxes = torch.tensor([[x, y, x + w, y + h] for _, _, (x, y, w, h), _ in rows]).float().reshape(-1, 4)
        found = dict(bboxes=boxes, scores=torch.tensor([d[3] for d in rows]).float())
        found["labels"] = torch.tensor([d[1] for d in rows]).long()
        metric.process({}, [dict(pred_instances=found, img_id=image, ori_shape=(SIDE, SIDE))])
    return metric.evaluate(len(images))


def test_metrics_are_cocos_or_refused(monkeypatch):
    outcomes, stats = Counter(), []

    class Recorded(coco_metric.COCOeval):
        def summarize(self) -> None:
            super().summarize()
            stats.append(self.stats)

    monkeypatch.setattr(coco_metric, "COCOeval", Recorded)

    @settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @given(data_sets())
    def check(drawn: tuple[dict, list[tuple]]) -> None:
        content, detections = drawn
        with TemporaryDirectory() as folder:
            file = str(Path(folder, "val.json"))
            Path(file).write_text(json.dumps(content))
            ids = [row["id"] for row in content["categories"]]
            classes = NAMES[: len(ids)]
            for kind in (CheckedCocoMetric, CocoMetric):
                try:
                    data = CheckedCocoDataset(file, dict(classes=tuple(classes)), **LOADED)
                    metric = kind(ann_file=file, classwise=True)
                    compare(metric, data, "val_evaluator", "val_dataloader")
                except UserError:
                    outcomes[kind.__name__, "refused"] += 1
                    continue
                images = [data.get_data_info(i)["img_id"] for i in range(len(data))]
                found = evaluate(metric, classes, images, detections)
                outcomes[kind.__name__, "equal" if found else "nothing predicted"] += 1
                if not found:
                    assert not detections
                    continue
                figures, by_class = expected(content, detections, ids)
                assert np.allclose(stats[-1][:6], figures, rtol=0, atol=1e-9), (stats[-1], figures)
                for name, value in by_class.items():  # of which mmdet gives three digits, or NaN without an object
                    given_ = found[f"coco/{name}_precision"]
                    assert isnan(given_) if value == -1 else abs(given_ - value) <= 5e-4 + 1e-9, (name, given_, value)
        stats.clear()

    check()
    for kind in ("CheckedCocoMetric", "CocoMetric"):
        assert outcomes[kind, "equal"] >= 30 and outcomes[kind, "refused"] >= 10, outcomes


@pytest.fixture
def file(tmp_path) -> str:
    """Two images, whose categories' ids descend."""
    content = dict(
        images=[dict(id=i, file_name=f"{i}.png", width=SIDE, height=SIDE) for i in (1, 2)],
        categories=[dict(id=9, name="a"), dict(id=5, name="b")],
        annotations=[
            dict(id=1, image_id=1, category_id=9, bbox=[10, 10, 20, 20], area=400, iscrowd=0),
            dict(id=2, image_id=2, category_id=5, bbox=[10, 10, 20, 20], area=400, iscrowd=0),
        ],
    )
    (tmp_path / "val.json").write_text(json.dumps(content))
    return str(tmp_path / "val.json")


HIT, MISS = [10, 10, 20, 20], [60, 60, 20, 20]


def test_each_class_has_its_own_figure_and_its_own_id(file, tmp_path):
    metric = CheckedCocoMetric(file, classwise=True, outfile_prefix=str(tmp_path / "results"))
    found = evaluate(metric, "ab", [1, 2], [(1, 0, HIT, 1.0), (2, 1, MISS, 1.0)])
    assert (found["coco/a_precision"], found["coco/b_precision"], found["coco/bbox_mAP"]) == (1.0, 0.0, 0.5)
    assert [row["category_id"] for row in json.loads((tmp_path / "results.bbox.json").read_text())] == [9, 5]


def test_what_was_predicted_is_evaluated(file):
    assert evaluate(CheckedCocoMetric(file), "ab", [2], [(2, 1, HIT, 1.0)])["coco/bbox_mAP"] == 1.0


@pytest.mark.parametrize(
    ("images", "detections", "message"),
    [
        ([1, 2, 1], [], r"image id 1 was predicted 2 times \(1 such images\): a data set that repeats or replaces"),
        ([1, 3], [], "image id 3 was predicted, but .*val.json does not list it"),
        ([1, 2], [(1, 0, HIT, float("nan"))], "boxes or scores that are not finite for image id 1"),
        ([1, 2], [(1, 0, [float("inf")] * 4, 1.0)], "boxes or scores that are not finite for image id 1"),
    ],
)
def test_predictions_that_cannot_be_evaluated(file, images, detections, message):
    with pytest.raises(UserError, match=message):
        evaluate(CheckedCocoMetric(file), "ab", images, detections)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(sort_categories=True), "takes categories in the file's order"),
        (dict(classwise=True, iou_thrs=[0.5]), "classwise figures need COCO's thresholds"),
        (dict(proposal_nums=(10, 50, 300)), r"proposal_nums must be three numbers, one of them COCO's 100, got \[10, "),
        (dict(metric="segm"), "has segmentation None, which is neither"),
    ],
)
def test_settings_that_cannot_be_evaluated(file, fields, message):
    with pytest.raises(UserError, match=message):
        CheckedCocoMetric(file, **fields)


def test_thresholds_in_a_list(file):
    found = evaluate(CheckedCocoMetric(file, iou_thrs=[0.5]), "ab", [1, 2], [(1, 0, HIT, 1.0), (2, 1, HIT, 1.0)])
    assert found["coco/bbox_mAP"] == found["coco/bbox_mAP_50"] == 1.0
