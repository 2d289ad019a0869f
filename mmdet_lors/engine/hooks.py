"""Hooks of a run: serving LORS folded while it is evaluated, and pictures of predictions."""

from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import scale_boxes
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_lors.lors.serving import serve

MIN_SIDE = 400
"""Longer side, in pixels, below which an image is enlarged: labels would cover it otherwise."""


def enlarged(image: np.ndarray, sample: DetDataSample, min_side: int = MIN_SIDE) -> tuple[np.ndarray, DetDataSample]:
    """A small image (H, W, 3) and its boxes, made larger by a whole factor; others come back as they are."""
    factor = -(-min_side // max(image.shape[:2]))
    if factor == 1:
        return image, sample
    sample = sample.clone()
    for instances in (sample.get("gt_instances"), sample.get("pred_instances")):
        if instances is not None:
            instances.bboxes = scale_boxes(instances.bboxes, (factor, factor))
    return mmcv.imrescale(image, factor), sample


@HOOKS.register_module()
class ServeFoldedHook(Hook):
    """Validation and tests run with LORS folded: at plain AdaMixer's speed, with its memory, the weights untouched."""

    priority = "VERY_LOW"

    def before_val_epoch(self, runner: Runner) -> None:
        """Fold, after hooks that swap weights for the evaluation (EMA)."""
        serve(runner.model)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Drop what was folded."""
        serve(runner.model, False)

    def before_test_epoch(self, runner: Runner) -> None:
        """Fold."""
        serve(runner.model)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Drop what was folded."""
        serve(runner.model, False)


@HOOKS.register_module()
class PicturesHook(DetVisualizationHook):
    """mmdet's visualization hook; when testing, it draws every ``interval``-th image, and small ones enlarged."""

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[DetDataSample]
    ) -> None:
        """Draw the images of this batch whose turn it is, objects on the left and predictions on the right."""
        folder = Path(runner.work_dir, runner.timestamp, self.test_out_dir) if self.test_out_dir else None
        first = batch_idx * runner.test_dataloader.batch_size
        for i, sample in enumerate(outputs, start=first):
            if i % self.interval:
                continue
            image, sample = enlarged(mmcv.imread(sample.img_path, channel_order="rgb"), sample.cpu())
            name = Path(sample.img_path).name
            self._visualizer.add_datasample(
                name,
                image,
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                pred_score_thr=self.score_thr,
                out_file=str(folder / name) if folder else None,
                step=i,
            )
