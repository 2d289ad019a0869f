"""Evaluators are compared with the data that they evaluate, before the first image."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset, MultiImageMixDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import HOOKS
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import ConcatDataset, Subset

from mmdet_lors.errors import UserError

from .files import annotation_file, keep, release
from .metric import CheckedCocoMetric

FIELDS = ("image_id", "category_id", "bbox", "area", "iscrowd")
"""What COCO's evaluation reads of an annotation."""


def use_evaluated_data_hook(cfg: Config) -> None:
    """Add the hook below to a config, unless its runtime already has it."""
    hooks = cfg.get("default_hooks") or {}
    if not any("EvaluatedDataHook" in str((hook or {}).get("type")) for hook in hooks.values()):
        cfg["default_hooks"] = dict(hooks, evaluated_data=dict(type="mmdet.EvaluatedDataHook"))


@HOOKS.register_module()
class EvaluatedDataHook(Hook):
    """Compares each evaluator with the data that its loop loads, and keeps that data set from replacing images.

    While a run is built, annotation files are kept in memory so that each is read once; they are dropped as it begins.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._compared: set[int] = set()
        keep()

    def before_train(self, runner: Runner) -> None:
        """Compare before the first step, not after the first epoch."""
        self._compare("val", runner.val_loop)
        release()

    def before_val(self, runner: Runner) -> None:
        """Compare before a validation."""
        self._compare("val", runner.val_loop)
        release()

    def before_test(self, runner: Runner) -> None:
        """Compare before a test."""
        self._compare("test", runner.test_loop)
        release()

    def after_train(self, runner: Runner) -> None:
        """Keep annotation files again: a test may follow in this process."""
        keep()

    def _compare(self, split: str, loop: Any) -> None:
        evaluator = getattr(loop, "evaluator", None)
        if evaluator is None or id(loop) in self._compared:
            return
        dataset = loop.dataloader.dataset
        never_replace(dataset)
        for metric in evaluator.metrics:
            compare(metric, dataset, f"{split}_evaluator", f"{split}_dataloader")
        self._compared.add(id(loop))


def never_replace(dataset: Any) -> None:
    """Make a bad image of this validation or test data an error, whatever its flags say."""
    for leaf in _nodes(dataset):
        if isinstance(leaf, BaseDataset):
            leaf.full_init()  # in which the flag decides what is filtered
            leaf.test_mode = True
        elif hasattr(leaf, "unusable"):
            leaf.training = False


def compare(metric: BaseMetric, dataset: Any, evaluator: str, loader: str) -> None:
    """Refuse a metric whose annotation file does not have the images, categories and annotations that are loaded.

    Where ``indices``, a filter or a wrapper leaves part of a data set, that part is evaluated.

    Args:
        metric: one without a file of its own evaluates against what the data set yields, and passes.
        dataset: what its loop loads: a data set or a wrapper.
        evaluator, loader: their names in messages.

    Raises:
        UserError: what differs, with both names.
    """
    truth = getattr(metric, "_coco_api", None) or getattr(metric, "_lvis_api", None)
    if truth is None:
        return
    nodes = list(_nodes(dataset))
    leaves = [node for node in nodes if not _inner(node)]
    name = getattr(metric, "ann_file", None) or "an annotation file"
    files = [getattr(leaf, "ann_file", None) for leaf in leaves]
    pair = f"{evaluator} evaluates against {name}, but {loader} loads {', '.join(map(str, files))}"
    of_files = all(isinstance(leaf, CocoDataset) and leaf.ann_file for leaf in leaves)
    if of_files:
        check_same_files(truth.dataset, name, files, pair, "segm" in getattr(metric, "metrics", ()), ordered=False)
    if isinstance(metric, CocoMetric):
        check_classwise(type(metric), metric.classwise, truth.dataset["categories"], evaluator)
        for leaf in leaves if of_files else ():
            leaf.full_init()
            if truth.get_cat_ids(cat_names=leaf.metainfo["classes"]) != leaf.cat_ids:
                raise UserError(f"{pair}: the first lists the categories in another order")
    if of_files and len(nodes) == 1 and leaves[0]._indices is None and len(leaves[0]) == len(truth.imgs):
        return
    infos = None if any(isinstance(node, MultiImageMixDataset) for node in nodes) else _infos(dataset)
    if infos is None:
        kind = type(dataset).__name__
        raise UserError(f"{evaluator} evaluates against {name}, which does not match what {loader}'s {kind} yields")
    names = {} if of_files else _names(truth.dataset["images"])
    ids = []
    for info in infos:
        ids.append(info.get("img_id"))
        path = info.get("img_path", "")
        if not of_files and Path(names.get(ids[-1], "")).name != Path(path).name:
            raise UserError(
                f"{evaluator} evaluates against {name}, but {loader} loads {path!r} as image id {ids[-1]}, which "
                f"{'is ' + repr(names[ids[-1]]) if ids[-1] in names else 'is not'} in the former"
            )
    twice = [image for image, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"{loader} has image id {twice[0]} {ids.count(twice[0])} times: each must be evaluated once")
    if isinstance(metric, CocoMetric) and not isinstance(metric, CheckedCocoMetric):
        metric.img_ids = ids


def check_classwise(kind: type, classwise: bool, categories: list[dict], evaluator: str) -> None:
    """Refuse mmdet's own metric where it would report one class's figures under the name of another.

    Raises:
        UserError: category ids are not in ascending order.
    """
    ids = [row["id"] for row in categories]
    if classwise and not issubclass(kind, CheckedCocoMetric) and ids != sorted(ids):
        raise UserError(
            f"{evaluator}: {kind.__name__} mixes up the classes' figures if category ids are not in ascending order; "
            "use type='CheckedCocoMetric'"
        )


def check_same_files(
    truth: dict, name: str, files: Sequence[str], pair: str, masks: bool = False, ordered: bool = True
) -> None:
    """Refuse an evaluator's file whose content is not that of the data sets' files.

    Args:
        truth: content of the evaluator's file.
        name: its path, or what to call it.
        files: those of the data sets that are evaluated together.
        pair: beginning of the message, with both names.
        masks: whether masks are evaluated.
        ordered: whether categories must be in the same order as well.

    Raises:
        UserError: the first difference, or two data sets that have an image id in common.
    """
    if [Path(name).resolve()] == [Path(file).resolve() for file in files]:
        return
    contents = [annotation_file(file).content for file in files]
    owners: dict[int, str] = {}
    for file, content in zip(files, contents, strict=True):
        shared = next((row["id"] for row in content["images"] if row["id"] in owners), None)
        if shared is not None:
            raise UserError(
                f"{pair}: {owners[shared]} and {file} both have image id {shared}; evaluate data sets one by one, or "
                "give their images different ids"
            )
        owners.update(dict.fromkeys((row["id"] for row in content["images"]), file))
    if difference := _difference(truth, contents, FIELDS + (("segmentation",) if masks else ()), ordered):
        raise UserError(f"{pair}: {difference}")


def _difference(truth: dict, contents: list[dict], fields: Sequence[str], ordered: bool) -> str | None:
    theirs, ours = _names(truth["images"]), _names(chain.from_iterable(c["images"] for c in contents))
    if len(theirs) != len(ours):
        return f"the first has {len(theirs)} images, the second {len(ours)}; both must be the same data set"
    for image, file in ours.items():
        if theirs.get(image) != file:
            there = f"is {theirs[image]!r}" if image in theirs else "is missing"
            return f"image id {image} {there} in the first and {file!r} in the second; both must be the same data set"
    for content in contents:
        for there, here in zip(*(_categories(c, ordered) for c in (truth, content)), strict=False):
            if there != here:
                return f"the first has {there[1]!r} as category id {there[0]}, the second {here[1]!r} as id {here[0]}"
        if len(truth["categories"]) != len(content["categories"]):
            return f"the first has {len(truth['categories'])} categories, the second {len(content['categories'])}"
    rows = [row for content in contents for row in content.get("annotations", [])]
    there, here = (_columns(part, fields) for part in (truth.get("annotations", []), rows))
    if there == here:
        return None
    there, here = (Counter(map(repr, zip(*columns, strict=True))) for columns in (there, here))
    if there == here:
        return None
    image = next(iter((there - here) or (here - there))).strip("(").split(",")[0]
    file = ours.get(int(image), image)
    return f"annotations of image id {image} ({file}) differ; both must be the same data set"


def _names(images: Iterable[dict]) -> dict[int, str]:
    return {row["id"]: row.get("file_name", "") for row in images}


def _categories(content: dict, ordered: bool) -> list[tuple[int, str]]:
    pairs = [(row["id"], row["name"]) for row in content["categories"]]
    return pairs if ordered else sorted(pairs)


def _columns(rows: list[dict], fields: Sequence[str]) -> list[list]:
    return [[row.get(field) for row in rows] for field in fields]


def _inner(dataset: Any) -> list:
    """What a wrapper such as RepeatDataset, ConcatDataset or torch's Subset wraps; empty for a data set."""
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    return [part for part in inner if hasattr(part, "__getitem__")]


def _nodes(dataset: Any) -> Iterator:
    """A data set and all that it wraps."""
    yield dataset
    for part in _inner(dataset):
        yield from _nodes(part)


def _infos(dataset: Any) -> Iterable[dict] | None:
    """mmengine's information on each image that a data set or wrapper yields, in order; None where it has none."""
    if isinstance(dataset, Subset):
        inner = dataset.dataset
        return map(inner.get_data_info, dataset.indices) if hasattr(inner, "get_data_info") else None
    if hasattr(dataset, "get_data_info"):
        return map(dataset.get_data_info, range(len(dataset)))
    if isinstance(dataset, ConcatDataset):
        parts = [_infos(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else chain.from_iterable(parts)
    return None
