"""Predictions as plain values: boxes by name, and results in COCO's format."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmdet_lors.datasets.annotations import check_categories, read_annotations
from mmdet_lors.datasets.exif import check_frame
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
    """The ids of images and classes in COCO's format.

    Args:
        images: image -> id.
        categories: label -> id.
        sizes: image -> (width, height) in pixels according to its annotation.
    """

    images: dict[str, int]
    categories: list[int]
    sizes: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)

    @classmethod
    def counted(cls, images: Sequence[str], classes: Sequence[str]) -> "CocoIds":
        """Ids that count from 1, in the order given."""
        return cls({image: i for i, image in enumerate(images, start=1)}, list(range(1, len(classes) + 1)))

    @classmethod
    def from_annotations(
        cls, path: Path, images: Sequence[str], classes: Sequence[str], frame: str | None = None
    ) -> "CocoIds":
        """Ids of an annotation file, found by class name and by the images' paths, which end with a ``file_name``.

        Raises:
            UserError: an annotation file that cannot be read, that lacks an image or a class, in which several entries
                fit one image, or whose sizes are not in the frame in which the image is loaded.
        """
        content = read_annotations(path)
        check_categories(content, path, None)
        categories = {row["name"]: row["id"] for row in content["categories"]}
        if missing := [name for name in classes if name not in categories]:
            raise UserError(
                f"annotation file {path} has no category {', '.join(map(repr, missing[:3]))}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} of the checkpoint's {len(classes)} "
                f"classes; it has {', '.join(map(repr, list(categories)[:5]))}{', ...' if len(categories) > 5 else ''}"
            )
        rows = _rows(path, content["images"], images)
        for image, row in rows.items():
            if {"width", "height"} <= row.keys():
                check_frame(image, row["width"], row["height"], frame)
        return cls(
            {image: row["id"] for image, row in rows.items()},
            [categories[name] for name in classes],
            {image: (row.get("width"), row.get("height")) for image, row in rows.items()},
        )

    def check_size(self, row: dict) -> None:
        """Refuse a result whose image does not have the annotated size.

        Args:
            row: ``image``, ``width`` and ``height`` in pixels.

        Raises:
            UserError: names the image and both sizes.
        """
        said, size = self.sizes.get(row["image"], (None, None)), (row["width"], row["height"])
        if None not in said and said != size:
            raise UserError(
                f"image {row['image']} has {size[0]} x {size[1]} pixels, but its annotation says {said[0]} x {said[1]}"
            )

    def results(self, row: dict) -> Iterator[dict]:
        """The boxes of one image: ``image_id``, ``category_id``, ``bbox`` as [x, y, width, height], ``score``.

        Args:
            row: ``image`` and its ``boxes``, as :func:`boxes` lists them; null stands for a number that is not finite.
        """
        for box in row["boxes"]:
            x1, y1, x2, y2 = (nan if value is None else value for value in box["bbox"])
            yield dict(
                image_id=self.images[row["image"]],
                category_id=self.categories[box["label"]],
                bbox=[x1, y1, x2 - x1, y2 - y1],
                score=box["score"],
            )


def _rows(path: Path, rows: list[dict], images: Sequence[str]) -> dict[str, dict]:
    """Image -> its row; ``file_name`` s are taken as below one folder if all images have a row below it."""
    by_parts = defaultdict(list)
    for place, row in enumerate(rows):
        if not isinstance(row, dict) or not {"id", "file_name"} <= row.keys() or not isinstance(row["file_name"], str):
            raise UserError(f"annotation file {path}: images[{place}] must have an id and a file_name")
        by_parts[_parts(os.path.normpath(row["file_name"]))].append(row)

    found = {}
    for image in images:
        parts = _parts(os.path.abspath(image))
        ends = {parts[:n]: by_parts[parts[n:]] for n in range(len(parts)) if parts[n:] in by_parts}
        if not ends:
            same = next((row["file_name"] for row in rows if _parts(row["file_name"])[-1:] == parts[-1:]), None)
            other = f"; it has {same!r}, whose folder is another" if same else ""
            raise UserError(f"annotation file {path} has no image whose file_name is the end of {image}{other}")
        found[image] = ends
    shared = set.intersection(*(set(ends) for ends in found.values()))
    chosen, taken = {}, {}
    for image, ends in found.items():
        left = [row for folder, some in ends.items() if not shared or folder in shared for row in some]
        if len(left) > 1:
            names = " or ".join(f"{row['file_name']!r} (id {row['id']!r})" for row in left[:2])
            raise UserError(
                f"image {image} may be {names} in annotation file {path}: give each image a file_name of its own"
            )
        chosen[image] = left[0]
        first = taken.setdefault(left[0]["id"], image)
        if first != image:
            raise UserError(
                f"images {first} and {image} are both {left[0]['file_name']!r} in annotation file {path}: "
                "give only images of the annotated data set"
            )
    return chosen


def _parts(path: str) -> tuple[str, ...]:
    """Folders and name, with accented letters in one form whatever form the file system uses."""
    return Path(unicodedata.normalize("NFC", path)).parts
