"""Checks of a config against the data on disk, before a run starts and writes anything."""

import json
from collections.abc import Iterator
from pathlib import Path

from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_lors.errors import UserError

COCO_HINT = "get train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org and unpack them there"
DIGITS_HINT = "make it with: python tools/dataset_converters/digits_to_coco.py"


def _hint(path: Path) -> str:
    return DIGITS_HINT if "digits" in path.parts else COCO_HINT


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


def read_annotations(path: Path) -> dict:
    """A COCO annotation file.

    Raises:
        UserError: no such file, no JSON, or no COCO data set.
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} does not exist; {_hint(path)}")
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"annotation file {path} is no JSON: {error}") from error
    missing = [k for k in ("images", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise UserError(f"annotation file {path} is no COCO data set: it has no {' and no '.join(missing)}")
    return content


def check_dataset(dataset: dict, where: str) -> tuple[str, ...] | None:
    """Check one data set: one of COCO's format, or one whose class has a ``check(**fields)`` of its own.

    Args:
        dataset: its config.
        where: its place in the config, for messages.

    Returns:
        Its classes, or None for a data set of another format, which is not checked.

    Raises:
        UserError: what is missing or does not fit, and how to mend it.
    """
    dataset_class = DATASETS.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]
    if hasattr(dataset_class, "check"):
        try:
            return dataset_class.check(**{key: value for key, value in dataset.items() if key != "type"})
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if "CocoDataset" in [c.__name__ for c in dataset_class.__mro__]:
        return _check_coco(dataset, dataset_class, where)
    return None


def _check_coco(dataset: dict, dataset_class: type, where: str) -> tuple[str, ...]:
    """The classes of a COCO-format data set whose annotation file, categories and image folder are there."""
    root = Path(dataset.get("data_root") or "")
    annotations = root / dataset["ann_file"]
    images = root / dataset.get("data_prefix", {}).get("img", "")
    if not root.is_dir():
        raise UserError(f"{where}: data folder {root} does not exist; {_hint(annotations)}")
    content = read_annotations(annotations)
    classes = dataset.get("metainfo", {}).get("classes") or dataset_class.METAINFO["classes"]
    classes = (classes,) if isinstance(classes, str) else tuple(classes)
    names = [c.get("name") for c in content["categories"]]
    unknown = [c for c in classes if c not in names]
    if unknown:
        raise UserError(
            f"{where}: {annotations} has no category {', '.join(map(repr, unknown[:3]))}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''} of the config's {len(classes)} classes; "
            f"it has {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"
        )
    if not images.is_dir():
        raise UserError(f"{where}: image folder {images} does not exist; {_hint(images)}")
    if content["images"]:
        first = images / content["images"][0]["file_name"]
        if not first.is_file():
            raise UserError(f"{where}: image {first}, the first of {annotations}, does not exist; {_hint(images)}")
    return classes


def _checkpoints(node: dict, path: str) -> Iterator[tuple[str, str]]:
    """(where, file) of every ``init_cfg`` in a model config that loads a file."""
    for key, value in node.items():
        for i, item in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(item, dict):
                where = f"{path}.{key}[{i}]" if isinstance(value, (list, tuple)) else f"{path}.{key}"
                if key == "init_cfg" and isinstance(item.get("checkpoint"), str):
                    yield f"{where}.checkpoint", item["checkpoint"]
                yield from _checkpoints(item, where)


def check_inputs(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check what a run of this config reads.

    Args:
        cfg: the whole config.
        splits: which of 'train', 'val' and 'test' the run uses.

    Raises:
        UserError: see :func:`check_dataset`; also a ``num_classes`` that does not match the data, data sets of
            different classes, and, to train, a file of weights to start from that does not exist.
    """
    if "train" in splits:
        for where, checkpoint in _checkpoints(cfg.model, "model"):
            if "://" not in checkpoint and not Path(checkpoint).is_file():
                raise UserError(f"{where}: file {checkpoint} does not exist")
    known: tuple[str, tuple[str, ...]] | None = None
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        if loader is None:
            continue
        for dataset in _leaf_datasets(loader["dataset"]):
            classes = check_dataset(dataset, f"{split}_dataloader")
            if not classes:
                continue
            known = known or (split, classes)
            if classes != known[1]:
                other = next((c for c in classes if c not in known[1]), None)
                raise UserError(
                    f"{split}_dataloader's {len(classes)} classes are not {known[0]}_dataloader's {len(known[1])}"
                    + (f", which do not have {other!r}" if other else "")
                )
            for where, num_classes in _num_classes(cfg.model, "model"):
                if num_classes != len(classes):
                    raise UserError(
                        f"{where} is {num_classes}, but {split}_dataloader's data set has {len(classes)} classes"
                    )
        for evaluator in _evaluators(cfg.get(f"{split}_evaluator")):
            if evaluator.get("ann_file"):
                read_annotations(Path(evaluator["ann_file"]))


def _evaluators(evaluator: dict | list | None) -> list[dict]:
    if evaluator is None:
        return []
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]
