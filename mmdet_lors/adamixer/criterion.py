"""What trains the decoder: queries are matched to objects, and every stage has its losses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from mmdet.models.losses import accuracy
from mmdet.models.task_modules.assigners import HungarianAssigner
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures import SampleList
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from mmengine.model import BaseModule
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mmdet_lors.errors import UserError
from mmdet_lors.transfer import constants_do_not_wait, to_device

from .stage import StageOutput


class Matching(NamedTuple):
    """The matched queries of S stages. An image has as many in every stage: K in all."""

    queries: Tensor
    """Their places among the B * N of all images, ascending, (S, K)."""
    labels: Tensor
    """Their objects' classes, (S, K)."""
    boxes: Tensor
    """Their objects' boxes in pixels, (S, K, 4)."""


class Criterion(BaseModule):
    """Set prediction as in DETR: a one-to-one matching by costs, then focal, L1 and GIoU losses of every stage.

    Args:
        num_classes: classes, without background.
        loss_cls, loss_bbox, loss_iou: losses of every stage.
        assigner: a Hungarian assigner, of which the match costs are used; None for inference alone.

    Raises:
        UserError: another assigner.
    """

    def __init__(
        self,
        num_classes: int,
        loss_cls: dict,
        loss_bbox: dict,
        loss_iou: dict,
        assigner: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_classes = num_classes
        self.assigner = TASK_UTILS.build(assigner) if assigner else None
        if assigner and not isinstance(self.assigner, HungarianAssigner):
            raise UserError(f"train_cfg.assigner must be a HungarianAssigner, got {type(self.assigner).__name__}")
        self.loss_cls = MODELS.build(loss_cls)
        self.loss_bbox = MODELS.build(loss_bbox)
        self.loss_iou = MODELS.build(loss_iou)

    def loss(
        self, feats: Sequence[Tensor], xyzr: Tensor, content: Tensor, batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        """Losses of every stage, 'stage{i}_loss_cls', '..._loss_bbox', '..._loss_iou', and '..._pos_acc' in %."""
        outputs = self(feats, xyzr, content)
        losses = {}
        with constants_do_not_wait(feats[0].device):
            matching = self.assign(outputs, batch_data_samples)
            bboxes = outputs[0].bboxes
            sizes = to_device([s.metainfo["img_shape"][1::-1] * 2 for s in batch_data_samples], bboxes)
            # Over all ranks together at least 1: clamping the mean to 1 would divide by more than one process does.
            num_positive = reduce_mean(bboxes.new_full((), matching.queries.shape[1])).clamp(min=1 / get_world_size())
            for i, (output, *targets) in enumerate(zip(outputs, *matching, strict=True)):
                for name, value in self.stage_loss(output, Matching(*targets), sizes, num_positive).items():
                    losses[f"stage{i}_{name}"] = value
        return losses

    @torch.no_grad()
    def assign(self, outputs: Sequence[StageOutput], batch_data_samples: SampleList) -> Matching:
        """Match queries to objects, one to one, in every stage and image; in the boxes' data type.

        Matching does not feed the forward pass, so that the costs of all stages and images go to the host at once: the
        only time that the losses make the host wait for the device.
        """
        assert self.assigner is not None  # only inference has none
        bboxes = torch.stack([output.bboxes for output in outputs], dim=1)
        scores = torch.stack([output.cls_score for output in outputs], dim=1).to(bboxes.dtype)
        batch, stages, num_queries, _ = bboxes.shape
        objects = [sample.gt_instances for sample in batch_data_samples]
        costs = [bboxes.new_empty(0)]
        for b, (sample, gt) in enumerate(zip(batch_data_samples, objects, strict=True)):
            if len(gt):
                predicted = InstanceData(scores=scores[b].flatten(0, 1), bboxes=bboxes[b].flatten(0, 1))
                gt = InstanceData(labels=gt.labels, bboxes=gt.bboxes.to(bboxes.dtype))
                terms = [cost(predicted, gt, sample.metainfo) for cost in self.assigner.match_costs]
                costs.append(sum(terms).flatten())
        host, pairs, first = torch.cat(costs).cpu().numpy(), [], 0
        for b, gt in enumerate(objects):
            cost, host = np.split(host, [stages * num_queries * len(gt)])
            matched = [linear_sum_assignment(stage) for stage in cost.reshape(stages, num_queries, len(gt))]
            pairs.append(np.stack(matched, axis=1) + np.array([b * num_queries, first])[:, None, None])
            first += len(gt)
        queries, matched = to_device(np.concatenate(pairs, axis=2), bboxes, torch.long)
        labels = torch.cat([gt.labels for gt in objects])[matched]
        return Matching(queries, labels, torch.cat([gt.bboxes for gt in objects])[matched].to(bboxes.dtype))

    def stage_loss(
        self, output: StageOutput, matching: Matching, sizes: Tensor, num_positive: Tensor
    ) -> dict[str, Tensor]:
        """Focal, L1 and GIoU loss of one stage, over the number of positives.

        L1 is taken on boxes divided by the image's (w, h, w, h), GIoU on pixel boxes. The sums are divided here,
        because the losses' own ``avg_factor`` adds a float32 epsilon to it.

        Args:
            output: what the stage predicts.
            matching: one stage of what :meth:`assign` returns.
            sizes: the images' (w, h, w, h) in pixels, (B, 4).
            num_positive: mean over ranks, in all at least 1.
        """
        queries, labels, targets = matching
        cls_score = output.cls_score.flatten(0, 1)
        # One-hot: of labels, mmdet's focal loss on a GPU is an operator of mmcv, which has to be compiled for CUDA.
        # ``classes[queries, labels] = 1`` would copy the 1 from the host, and wait.
        classes = torch.zeros_like(cls_score).index_put_((queries, labels), cls_score.new_ones(()))
        bboxes = output.bboxes.flatten(0, 1).index_select(0, queries)
        size = sizes.index_select(0, queries // output.bboxes.shape[1])
        losses = dict(
            loss_cls=self.loss_cls(cls_score, classes, reduction_override="sum") / num_positive,
            pos_acc=accuracy(cls_score.detach().index_select(0, queries), labels),
            loss_bbox=self.loss_bbox(bboxes / size, targets / size, reduction_override="sum") / num_positive,
            loss_iou=self.loss_iou(bboxes, targets, reduction_override="sum") / num_positive,
        )
        return losses
