"""mmdet's CocoDataset that checks its annotations, its images, and what the pipeline makes of them."""

import logging
from os import SEEK_END
from pathlib import Path

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS
from mmengine.logging import print_log
from PIL import Image

from mmdet_lors.errors import UserError

from .annotations import check_annotations, read_annotations
from .unusable import MAX_UNUSABLE_SHARE, UnusableImages, check_share, reason_of


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """COCO's format; bad data are refused, or skipped and counted, but never trained on or dropped silently.

    The annotation file is checked as it is loaded (:func:`~mmdet_lors.datasets.annotations.check_annotations`). In
    training an image is replaced by another, random one when it cannot be read, has not the size that its annotation
    says, when a step of the pipeline fails on it, or leaves boxes that are not finite. It is logged once. In
    validation and test such an image is an error: without it the metrics would be those of another data set.

    Args:
        max_unusable_share: share of all images, 0 to 1, of which each process may meet as many unusable ones.
        **fields: mmdet's ``CocoDataset``'s.

    Raises:
        UserError: the file, image or share that is too large, in one line.
    """

    def __init__(self, *args, max_unusable_share: float = MAX_UNUSABLE_SHARE, **fields) -> None:
        check_share(max_unusable_share)
        self.max_unusable_share = max_unusable_share
        super().__init__(*args, **fields)

    def COCOAPI(self, path: str):  # noqa: N802
        """mmdet's COCO index of this file, which it reads and indexes only after the check."""
        content = read_annotations(Path(path))
        for line in check_annotations(content, Path(path), self.metainfo["classes"], self.test_mode):
            print_log(line, logger="current", level=logging.WARNING)
        coco = _Index()
        coco.dataset = content
        coco.createIndex()
        return coco

    def full_init(self) -> None:
        """Load, check and filter the annotations."""
        if not self._fully_initialized:
            super().full_init()
            self.unusable = UnusableImages(len(self), self.max_unusable_share)

    def filter_data(self) -> list[dict]:
        """The images that training uses, by ``filter_cfg``.

        Raises:
            UserError: none is left.
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
        """What the pipeline makes of an image; None where it makes nothing of it, or the image cannot be used."""
        data = self.get_data_info(index)
        path, loaded = data["img_path"], False
        try:
            _check_whole(Path(path))
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


class _Index(COCO):
    """mmdet's COCO index, whose names of its own follow whenever the index is made."""

    def createIndex(self) -> None:  # noqa: N802
        """Index annotations by image and by category."""
        super().createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


def _check_whole(path: Path) -> None:
    """Refuse a JPEG that is cut short: OpenCV before 4.11 decodes it, with grey in place of what is missing."""
    if not path.is_file():
        return
    if not path.stat().st_size:
        raise UserError("it is empty")
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(-min(2, path.stat().st_size), SEEK_END)
        end = file.read(2)
    if start == b"\xff\xd8" and end != b"\xff\xd9":
        # It may just have something behind its end: Pillow, which is strict, decides.
        with Image.open(path) as image:
            image.load()


def _check_size(data: dict) -> None:
    """Boxes are in the pixels of an image of the annotated size."""
    height, width = data["ori_shape"]
    if (width, height) != (data["width"], data["height"]):
        raise UserError(f"it has {width} x {height} pixels, but its annotation says {data['width']} x {data['height']}")


def _check_boxes(data: dict, step: str) -> None:
    """Boxes after a step of the pipeline: before packing in ``gt_bboxes``, then in ``data_samples``."""
    boxes = data.get("gt_bboxes")
    if boxes is None:
        samples = data.get("data_samples")
        instances = getattr(samples, "gt_instances", None)
        boxes = getattr(instances, "bboxes", None)
    if boxes is None:
        return
    boxes = getattr(boxes, "tensor", boxes)
    finite = torch.isfinite(boxes) if torch.is_tensor(boxes) else np.isfinite(boxes)
    if not finite.all():
        raise UserError(f"{step} leaves a box that is not finite")
