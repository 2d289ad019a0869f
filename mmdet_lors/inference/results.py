"""Predictions as plain values: boxes by name, and results in COCO's format."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmdet_lors.datasets.annotations import check_categories, read_annotations
from mmdet_lors.errors import UserError


def _above(sample: DetDataSample, score_thr: float) -> InstanceData:
    return sample.pred_instances[sample.pred_instances.scores > score_thr]


def boxes(sample: DetDataSample, classes: Sequence[str], score_thr: float = 0.0) -> list[dict]:
    """The boxes of one image with a score above ``score_thr``, best first.

    Returns:
        Per box ``class`` (name), ``label``, ``score`` and ``bbox``, [x1, y1, x2, y2] in pixels of the image.
    """
    found = _above(sample, score_thr)
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), strict=True)
    listed = [{"class": classes[label], "label": label, "score": score, "bbox": bbox} for label, score, bbox in rows]
    return sorted(listed, key=lambda box: -box["score"])


@dataclass
class CocoIds:
    """The numbers that COCO's format has for images and classes.

    Args:
        images: image -> id.
        categories: label -> id.
    """

    images: dict[str, int]
    categories: list[int]

    @classmethod
    def counted(cls, images: Sequence[str], classes: Sequence[str]) -> "CocoIds":
        """Counted from 1, in the order given."""
        return cls({image: i for i, image in enumerate(images, start=1)}, list(range(1, len(classes) + 1)))

    @classmethod
    def from_annotations(cls, path: Path, images: Sequence[str], classes: Sequence[str]) -> "CocoIds":
        """Those of an annotation file, found by file name and class name.

        Raises:
            UserError: an annotation file that cannot be read, that lacks an image or a class, or that has several
                images of one name.
        """
        content = read_annotations(path)
        check_categories(content, path, tuple(classes))
        by_name = defaultdict(list)
        for row in content["images"]:
            by_name[Path(row["file_name"]).name].append(row["id"])
        ids = {}
        for image in images:
            found = by_name[Path(image).name]
            if len(found) != 1:
                what = "no image" if not found else f"{len(found)} images"
                raise UserError(f"annotation file {path} has {what} of the name {Path(image).name} ({image})")
            ids[image] = found[0]
        categories = {row["name"]: row["id"] for row in content["categories"]}
        return cls(ids, [categories[name] for name in classes])

    def results(self, image: str, sample: DetDataSample) -> list[dict]:
        """All predictions of one image: ``image_id``, ``category_id``, ``bbox`` as [x, y, width, height], ``score``."""
        found = sample.pred_instances
        corner, opposite = found.bboxes.split(2, dim=1)
        xywh = torch.cat([corner, opposite - corner], dim=1)
        return [
            dict(image_id=self.images[image], category_id=self.categories[label], bbox=bbox, score=score)
            for label, bbox, score in zip(found.labels.tolist(), xywh.tolist(), found.scores.tolist(), strict=True)
        ]
