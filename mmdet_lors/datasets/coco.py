"""mmdet's CocoDataset with checks of its annotations, its images, and what the pipeline makes of them."""

import logging
import math
import os
from typing import BinaryIO

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.logging import print_log
from PIL import Image

from mmdet_lors.errors import UserError

from .annotations import class_names
from .exif import frame_of, frame_problem
from .files import annotation_file
from .unusable import MAX_UNUSABLE_SHARE, UnusableImages, check_share, reason_of


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """COCO-format data; what is bad is refused, or skipped and counted, but never trained on or dropped silently.

    The annotation file is checked as it is loaded (:func:`~mmdet_lors.datasets.annotations.check_annotations`). In
    training an image is replaced by another, random one if it cannot be read, if its size is not the annotated one, if
    its boxes may be in another frame than its pixels (:mod:`~mmdet_lors.datasets.exif`), or if a step of the pipeline
    fails on it or leaves boxes that are not finite. It is logged once. In validation and test such an image is an
    error: without it the metrics would be those of another data set. ``test_mode`` tells the two apart; in a run
    :class:`~mmdet_lors.datasets.evaluation.EvaluatedDataHook` sets it, by the loop that uses the data set.

    Args:
        max_unusable_share: largest share of all images, 0 to 1, that each process may find unusable.
        exif: 'shown' or 'stored', for pictures with an EXIF orientation: the frame that boxes are in, which must be
            the one that the pipeline loads.
        **fields: those of mmdet's ``CocoDataset``.

    Raises:
        UserError: names the file or image that is refused, or the limit that is exceeded, in one line.
    """

    def __init__(
        self, *args, max_unusable_share: float = MAX_UNUSABLE_SHARE, exif: str | None = None, **fields
    ) -> None:
        check_share(max_unusable_share)
        self.max_unusable_share = max_unusable_share
        self.frame = frame_of(fields.get("pipeline", ()), exif)
        super().__init__(*args, **fields)

    @classmethod
    def _load_metainfo(cls, metainfo: dict | None = None) -> dict:
        if metainfo and "classes" in metainfo:
            metainfo = dict(metainfo, classes=class_names(metainfo["classes"]))
        return super()._load_metainfo(metainfo)

    def COCOAPI(self, path: str):  # noqa: N802
        """mmdet's COCO index of this file, which is made only after the file has been checked."""
        file = annotation_file(path)
        for line in file.check(self.metainfo["classes"], self.test_mode):
            print_log(line, logger="current", level=logging.WARNING)
        return file.index

    def full_init(self) -> None:
        """Load, check and filter the annotations."""
        if not self._fully_initialized:
            super().full_init()
            self.unusable = UnusableImages(len(self), self.max_unusable_share)
            # Known to all workers: a run looks into a file once, since opening it takes long on a network file system.
            self.file_checked = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def filter_data(self) -> list[dict]:
        """The images that training uses, by ``filter_cfg``.

        Raises:
            UserError: no image is left.
        """
        kept = super().filter_data()
        if not kept:
            raise UserError(
                f"annotation file {self.ann_file}: filter_cfg {self.filter_cfg} leaves none of {len(self.data_list)} "
                "images"
            )
        return kept

    def __getitem__(self, index: int) -> dict:
        """``inputs``, the image, and ``data_samples`` of this image, or in training of another one in its place."""
        for _ in range(self.max_refetch + 1):
            data = self.prepare_data(index)
            if data is not None:
                return data
            if self.test_mode:
                raise UserError(f"image {self.get_data_info(index)['img_path']}: the test pipeline returned nothing")
            index = self._rand_another()
        raise UserError(f"{self.max_refetch + 1} images in a row could not be used; the log names them")

    def prepare_data(self, index: int) -> dict | None:
        """What the pipeline makes of an image; None if that is nothing, or if the image cannot be used."""
        data = self.get_data_info(index)
        path, loaded = data["img_path"], False
        try:
            if not self.file_checked[index]:
                self._check_file(path, data)
                self.file_checked[index] = True
            for step in self.pipeline.transforms:
                try:
                    data = step(data)
                except (MemoryError, UserError):
                    raise
                except Exception as error:
                    if loaded:
                        raise UserError(f"{type(step).__name__}: {reason_of(error)}") from error
                    if isinstance(error, AssertionError):  # mmcv's, that the decoder returned something
                        raise UserError("it cannot be decoded") from None
                    raise
                if data is None:
                    return None
                if not loaded and "img" in data:
                    loaded = True
                    _check_size(data)
                _check_boxes(data, type(step).__name__)
            return data
        except MemoryError:
            raise
        except Exception as error:
            if self.test_mode:
                raise UserError(f"image {path} cannot be used: {reason_of(error)}") from error
            self.unusable.add(index, path, error, trace=loaded and error.__cause__ is not None)
            return None

    def _check_file(self, path: str, data: dict) -> None:
        """Refuse what the decoder would not: a JPEG that is cut short, boxes in another frame than the pixels."""
        if not os.path.isfile(path):  # the loader says so, unless it reads from elsewhere
            return
        with open(path, "rb") as file:
            _check_whole(file)
            problem = frame_problem(file, data["width"], data["height"], self.frame)
        if problem:
            raise UserError(f"it {problem}")


def _check_whole(file: BinaryIO) -> None:
    """Refuse a JPEG that is cut short: OpenCV before 4.11 decodes it, with grey in place of what is missing."""
    start = file.read(2)
    if not start:
        raise UserError("it is empty")
    file.seek(-len(start), os.SEEK_END)
    end = file.read(2)
    file.seek(0)
    if start == b"\xff\xd8" and end != b"\xff\xd9":
        # It may merely have extra bytes after its end: Pillow, which is strict, decides.
        with Image.open(file) as image:
            image.load()
        file.seek(0)


def _check_size(data: dict) -> None:
    """Refuse an image that does not have the annotated size."""
    height, width = data["ori_shape"]
    if (width, height) != (data["width"], data["height"]):
        raise UserError(f"it has {width} x {height} pixels, but its annotation says {data['width']} x {data['height']}")


def _check_boxes(data: dict, step: str) -> None:
    """Refuse boxes that a step made non-finite: they are in ``gt_bboxes`` before packing, then in ``data_samples``."""
    boxes = data.get("gt_bboxes")
    if boxes is None:
        samples = data.get("data_samples")
        instances = getattr(samples, "gt_instances", None)
        boxes = getattr(instances, "bboxes", None)
    if boxes is None:
        return
    # The sum of numbers of which one is not finite is not finite.
    if not math.isfinite(getattr(boxes, "tensor", boxes).sum()):
        raise UserError(f"{step} leaves a box that is not finite")
