"""Annotation files, each read, indexed and checked once per process while a run is built."""

import gc
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from mmdet.datasets.api_wrappers import COCO

from .annotations import check_annotations, read_annotations, without_collector

_kept: dict[tuple, "AnnotationFile"] | None = None


class AnnotationFile:
    """One file's content, its index and its checks. Nobody may change them before :func:`release`.

    Args:
        path: the file.

    Raises:
        UserError: see :func:`~mmdet_lors.datasets.annotations.read_annotations`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = read_annotations(path)
        self._checked: dict[tuple, list[str]] = {}

    @cached_property
    def index(self) -> COCO:
        """mmdet's index of the file."""
        index = _Index()
        index.dataset = self.content
        with without_collector():
            index.createIndex()
        return index

    def check(self, classes: Sequence[str] | None, evaluated: bool, masks: bool = False) -> list[str]:
        """Run :func:`~mmdet_lors.datasets.annotations.check_annotations`, once for equal arguments."""
        key = (None if classes is None else tuple(classes), evaluated, masks)
        if key not in self._checked:
            with without_collector():
                self._checked[key] = check_annotations(self.content, self.path, classes, evaluated, masks)
        return self._checked[key]


class _Index(COCO):
    """mmdet's COCO index, whose additional names are updated whenever the index is made."""

    def createIndex(self) -> None:  # noqa: N802
        """Index annotations by image and by category."""
        super().createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


def annotation_file(path: str | Path) -> AnnotationFile:
    """The annotation file, read again unless :func:`keep` was called and the file has not changed since.

    Raises:
        UserError: see :func:`~mmdet_lors.datasets.annotations.read_annotations`.
    """
    path = Path(path)
    if _kept is None or not path.is_file():
        return AnnotationFile(path)
    status = path.stat()
    key = (path.resolve(), status.st_mtime_ns, status.st_size)
    if key not in _kept:
        _kept[key] = AnnotationFile(path)
        # mmengine collects garbage after loading a data set: it need not look at millions of objects that stay.
        gc.freeze()
    return _kept[key]


def keep() -> None:
    """Keep files in memory from now on: the check, data sets and metrics of a run being built read the same ones."""
    global _kept
    _kept = {} if _kept is None else _kept


def release() -> None:
    """Drop the files that were kept: the run begins."""
    global _kept
    if _kept:
        gc.unfreeze()
    _kept = None
