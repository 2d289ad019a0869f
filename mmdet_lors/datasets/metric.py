"""mmdet's CocoMetric that refuses what it would evaluate wrongly."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from mmdet_lors.errors import UserError

from .files import annotation_file, release


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """COCO's evaluation of the images that were predicted, each once.

    The annotation file is checked as it is read, by the rules of
    :func:`~mmdet_lors.datasets.annotations.check_annotations`. Per-class figures are right whatever the order of
    category ids. Without ``ann_file`` the ground truth is what the data set yields, as in mmdet: sizes of objects are
    then those of their boxes, and what the data set does not load is not counted.

    Args:
        ann_file, args, fields: those of mmdet's ``CocoMetric``, except ``sort_categories``.

    Raises:
        UserError: an annotation file that cannot be right; when it evaluates: predictions that are not finite, are for
            images that the file does not list, or are for one image twice.
    """

    def __init__(self, ann_file: str | None = None, *args, **fields) -> None:
        if fields.pop("sort_categories", False):
            raise UserError("CheckedCocoMetric takes categories in the file's order: leave sort_categories out")
        super().__init__(None, *args, **fields)
        self.iou_thrs = np.atleast_1d(self.iou_thrs)  # pycocotools finds no threshold in a list
        if self.classwise and (len(self.iou_thrs) < 6 or not np.allclose(self.iou_thrs[[0, 5]], [0.5, 0.75])):
            raise UserError("classwise figures need COCO's thresholds, 0.5 to 0.95: leave iou_thrs out")
        if {"bbox", "segm"} & set(self.metrics) and (len(self.proposal_nums) != 3 or 100 not in self.proposal_nums):
            raise UserError(f"proposal_nums must be three numbers, one of them COCO's 100, got {self.proposal_nums}")
        self.ann_file = ann_file
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=self.backend_args) as path:
                file = annotation_file(path)
                file.check(None, evaluated=True, masks="segm" in self.metrics)
                self._coco_api = file.index

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep the predictions of one batch."""
        for sample in data_samples:
            found = sample["pred_instances"]
            if not (found["bboxes"].isfinite().all() and found["scores"].isfinite().all()):
                raise UserError(f"the model predicts boxes or scores that are not finite for image {_name(sample)}")
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The metrics of all predictions."""
        release()  # pycocotools writes into the annotations
        seen = [prediction["img_id"] for _, prediction in results]
        twice = [image for image, count in Counter(seen).items() if count > 1]
        if twice:
            raise UserError(
                f"image id {twice[0]} was predicted {seen.count(twice[0])} times ({len(twice)} such images): a data "
                "set that repeats or replaces images cannot be evaluated"
            )
        if self.ann_file is not None:
            known = self._coco_api.imgs
            unknown = [image for image in seen if image not in known]
            if unknown:
                raise UserError(f"image id {unknown[0]} was predicted, but {self.ann_file} does not list it")
            if len(seen) < len(known):
                print_log(f"{self.ann_file}: {len(seen)} of its {len(known)} images are evaluated", "current")
            # In the order of predictions, which proposal_fast relies on.
            self.img_ids = seen
            # Ascending: COCO's evaluation sorts them, and mmdet names classes by their place.
            self.cat_ids = sorted(self._ids_of_labels())
        return super().compute_metrics(results)

    def results2json(self, results: Sequence[dict], outfile_prefix: str) -> dict:
        """Write predictions with the category ids of their labels."""
        if self.ann_file is not None:
            place = np.argsort(np.argsort(self._ids_of_labels()))
            results = [dict(result, labels=place[result["labels"]]) for result in results]
        return super().results2json(results, outfile_prefix)

    def _ids_of_labels(self) -> list[int]:
        return self._coco_api.get_cat_ids(cat_names=self.dataset_meta["classes"])


def _name(sample: dict) -> str:
    return Path(sample["img_path"]).name if "img_path" in sample else f"id {sample['img_id']}"
