"""Checks of a config against the data on disk, before a run starts and writes anything."""

import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import Registry

from mmdet_lors.datasets import CheckedCocoDataset, CheckedCocoMetric
from mmdet_lors.errors import UserError

from .annotations import check_categories, class_names, hint
from .evaluation import check_classwise, check_same_files
from .exif import frame_of
from .files import annotation_file, keep
from .unusable import MAX_UNUSABLE_SHARE

SEGMENTATION_HINT = "docs/pela_recipes.md says how to get it"


def _leaf_datasets(dataset: dict) -> Iterator[dict]:
    """The innermost datasets below wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get("datasets") or [dataset["dataset"]] if {"dataset", "datasets"} & set(dataset) else None
    if inner is None:
        yield dataset
    else:
        for part in inner:
            yield from _leaf_datasets(part)


def _num_classes(node: dict, path: str) -> Iterator[tuple[str, int]]:
    """(where, value) of every ``num_classes`` of a detection head or classifier in a model config."""
    for key, value in node.items():
        if key == "num_classes" and isinstance(value, int):
            yield f"{path}.{key}", value
        elif isinstance(value, dict) and key not in ("backbone", "rpn_head"):
            yield from _num_classes(value, f"{path}.{key}")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _num_classes(item, f"{path}.{key}[{i}]")


def check_dataset(dataset: dict, where: str, evaluated: bool | None = None) -> tuple[str, ...] | None:
    """Check one data set: one of COCO's format, or one whose class has a ``check(**fields)`` of its own.

    Args:
        dataset: its config.
        where: its place in the config, for messages.
        evaluated: whether that place is validation or test; None: what its ``test_mode`` says.

    Returns:
        Its classes, or None for a data set of another format, which is not checked.

    Raises:
        UserError: what is missing or does not fit, and how to fix it.
    """
    dataset_class = _registered(dataset, DATASETS)
    if dataset_class is None:
        raise UserError(f"{where}: {dataset['type']} is not in the {DATASETS.scope}::dataset registry")
    evaluated = bool(dataset.get("test_mode")) if evaluated is None else evaluated
    if hasattr(dataset_class, "check"):
        try:
            return dataset_class.check(**{key: value for key, value in dataset.items() if key != "type"})
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if "CocoDataset" in [c.__name__ for c in dataset_class.__mro__]:
        return _check_coco(dataset, dataset_class, where, evaluated)
    if "BaseSegDataset" in [c.__name__ for c in dataset_class.__mro__]:
        return _check_segmentation(dataset, dataset_class, where)
    return None


def _registered(part: dict, registry: Registry) -> type | None:
    """The registered class of a part, looked up as the run does: in its own scope, or in the config's default one."""
    if not isinstance(part["type"], str):
        return part["type"]
    with registry.switch_scope_and_registry(part.get("_scope_")) as scoped:
        return scoped.get(part["type"])


def _check_segmentation(dataset: dict, dataset_class: type, where: str) -> tuple[str, ...] | None:
    """Check that an mmsegmentation data set's folders exist, and return its classes."""
    root = Path(dataset.get("data_root") or "")
    if not root.is_dir():
        raise UserError(f"{where}: data folder {root} does not exist; {SEGMENTATION_HINT}")
    for kind, folder in dataset.get("data_prefix", {}).items():
        if folder and not (root / folder).is_dir():
            raise UserError(f"{where}: {kind} folder {root / folder} does not exist; {SEGMENTATION_HINT}")
    return dataset.get("metainfo", {}).get("classes") or dataset_class.METAINFO.get("classes")


def _check_coco(dataset: dict, dataset_class: type[CocoDataset], where: str, evaluated: bool) -> tuple[str, ...]:
    """Check a COCO-format data set's annotation file and that its images exist, and return its classes."""
    root = Path(dataset.get("data_root") or "")
    if not isinstance(dataset.get("ann_file"), str):
        raise UserError(f"{where}: ann_file must be the path of an annotation file, got {dataset.get('ann_file')!r}")
    annotations = root / dataset["ann_file"]
    images = root / dataset.get("data_prefix", {}).get("img", "")
    if not root.is_dir():
        raise UserError(f"{where}: data folder {root} does not exist; {hint(annotations)}")
    # Other data sets of mmdet, such as LVIS and the panoptic one, have fields of their own.
    plain = dataset_class.parse_data_info is CocoDataset.parse_data_info
    file = annotation_file(annotations)
    try:
        classes = class_names((dataset.get("metainfo") or {}).get("classes") or dataset_class.METAINFO["classes"])
        if not plain:
            check_categories(file.content, annotations, classes)
            return classes
        lines = file.check(classes, evaluated)
        if issubclass(dataset_class, CheckedCocoDataset):
            frame_of(dataset.get("pipeline", ()), dataset.get("exif"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not issubclass(dataset_class, CheckedCocoDataset):  # which writes them to the run's own log
        for line in lines:
            print_log(f"{where}: {line}", logger="current", level=logging.WARNING)
    if not images.is_dir():
        raise UserError(f"{where}: image folder {images} does not exist; {hint(images)}")
    share = 0.0 if evaluated else dataset.get("max_unusable_share", MAX_UNUSABLE_SHARE)
    _check_files(file.content["images"], images, annotations, share, where)
    return classes


def _check_files(rows: list[dict], folder: Path, annotations: Path, share: float, where: str) -> None:
    """Refuse missing images: the data set's first one, or, in training, more than may be unusable."""
    first = folder / rows[0]["file_name"]
    if not first.is_file():
        raise UserError(f"{where}: image {first}, the first of {annotations}, does not exist{_why(first)}")
    # One listing per folder: asking for every file takes minutes on a network file system.
    names = defaultdict(set)
    for row in rows:
        parent, _, name = row["file_name"].rpartition("/")
        names[parent].add(name)
    missing = []
    for parent, wanted in names.items():
        there = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
        missing += sorted(folder / parent / name for name in wanted - there)
    if len(missing) > share * len(rows):
        raise UserError(
            f"{where}: {len(missing)} of {len(rows)} images of {annotations} do not exist, such as {missing[0]}"
            f"{_why(missing[0])}"
        )
    if missing:
        print_log(f"{where}: {len(missing)} images do not exist, such as {missing[0]}", "current", logging.WARNING)


def _checkpoints(node: dict, path: str) -> Iterator[tuple[str, str]]:
    """(where, file) of every ``init_cfg`` in a model config that loads a file, and of every teacher checkpoint."""
    for key, value in node.items():
        if key == "teacher_checkpoint" and isinstance(value, str):
            yield f"{path}.{key}", value
        for i, item in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(item, dict):
                where = f"{path}.{key}[{i}]" if isinstance(value, (list, tuple)) else f"{path}.{key}"
                if key == "init_cfg" and isinstance(item.get("checkpoint"), str):
                    yield f"{where}.checkpoint", item["checkpoint"]
                yield from _checkpoints(item, where)


def check_inputs(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check everything that a run of this config reads.

    Args:
        cfg: the whole config.
        splits: which of 'train', 'val' and 'test' the run uses.

    Raises:
        UserError: see :func:`check_dataset`; also a ``num_classes`` that does not match the data, data sets of
            different classes, and, for training, a file of initial weights that does not exist.
    """
    if "train" in splits:
        for where, checkpoint in _checkpoints(cfg.model, "model"):
            if "://" not in checkpoint and not Path(checkpoint).is_file():
                raise UserError(f"{where}: file {checkpoint} does not exist")
    keep()
    known: tuple[str, tuple[str, ...]] | None = None
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        if loader is None:
            continue
        datasets = list(_leaf_datasets(loader["dataset"]))
        for dataset in datasets:
            classes = check_dataset(dataset, f"{split}_dataloader", split != "train")
            if not classes:
                continue
            known = known or (split, classes)
            if classes != known[1]:
                other = next((c for c in classes if c not in known[1]), None)
                raise UserError(
                    f"{split}_dataloader's {len(classes)} classes are not {known[0]}_dataloader's {len(known[1])}"
                    + (f", which lack {other!r}" if other else "")
                )
            for where, num_classes in _num_classes(cfg.model, "model"):
                if num_classes != len(classes):
                    raise UserError(
                        f"{where} is {num_classes}, but {split}_dataloader's data set has {len(classes)} classes"
                    )
        for evaluator in _evaluators(cfg.get(f"{split}_evaluator")):
            _check_evaluator(evaluator, datasets, f"{split}_evaluator", f"{split}_dataloader")


def _check_evaluator(evaluator: dict, datasets: list[dict], where: str, loader: str) -> None:
    """Refuse an evaluator whose annotations are not the data sets'; the hook checks more once the run is built."""
    kind, path = _registered(evaluator, METRICS), evaluator.get("ann_file")
    is_coco = isinstance(kind, type) and issubclass(kind, CocoMetric)
    if not path:
        keys = [dataset["pipeline"][-1].get("meta_keys", ()) for dataset in datasets if dataset.get("pipeline")]
        if kind in (CocoMetric, CheckedCocoMetric) and not all("instances" in part for part in keys):
            raise UserError(
                f"{where} has no ann_file and would evaluate against what {loader} yields, which has no ground truth: "
                "give it the data set's ann_file, or add 'instances' to the meta_keys of PackDetInputs"
            )
        return
    file = annotation_file(path)
    if not is_coco:
        return
    metrics = evaluator.get("metric", "bbox")
    masks = "segm" in ([metrics] if isinstance(metrics, str) else metrics)
    try:
        file.check(None, evaluated=True, masks=masks)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    check_classwise(kind, evaluator.get("classwise", False), file.content["categories"], where)
    files = [str(Path(data.get("data_root") or "") / data["ann_file"]) for data in datasets if data.get("ann_file")]
    if len(files) == len(datasets):
        pair = f"{where} evaluates against {path}, but {loader} loads {', '.join(files)}"
        check_same_files(file.content, path, files, pair, masks, not evaluator.get("sort_categories"))


def _evaluators(evaluator: dict | list | None) -> list[dict]:
    """The metrics of an evaluator's config."""
    if evaluator is None:
        return []
    if isinstance(evaluator, dict):
        evaluator = evaluator.get("metrics", [evaluator])
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]


def _why(path: Path) -> str:
    """Why a file may seem not to exist, or how to get it."""
    if "\\" in str(path) and Path(str(path).replace("\\", "/")).is_file():
        return ", but does exist with / in place of \\: write file_name with / in the annotation file"
    for key, difference in ((_composed, "how Unicode composes letters (NFC, NFD)"), (_folded, "upper and lower case")):
        if there := _alike(path, key):
            return (
                f", but {there} does, and differs only in {difference}: rename it, or change file_name in the "
                "annotation file"
            )
    return f"; {hint(path)}"


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()


def _alike(path: Path, key: Callable[[str], str]) -> Path | None:
    """An existing file whose path equals this one when both are mapped by ``key``."""
    here = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        if not (here / part).exists():
            names = os.listdir(here) if here.is_dir() else []
            part = next((name for name in names if key(name) == key(part)), None)
            if part is None:
                return None
        here /= part
    return here
