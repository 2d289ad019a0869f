"""What trains the decoder: queries are matched to objects, and every stage has its losses."""

from collections.abc import Sequence

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

from .stage import StageOutput


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
        targets = self.assign(outputs, batch_data_samples)
        losses = {}
        for i, (output, labels, boxes) in enumerate(zip(outputs, *targets, strict=True)):
            for name, value in self.stage_loss(output, labels, boxes, batch_data_samples).items():
                losses[f"stage{i}_{name}"] = value
        return losses

    @torch.no_grad()
    def assign(self, outputs: Sequence[StageOutput], batch_data_samples: SampleList) -> tuple[Tensor, Tensor]:
        """Match queries to objects, one to one, in every stage and image; in the boxes' data type.

        Matching does not feed the forward pass, so that the costs of all stages and images go to the host at once.

        Returns:
            For all B * N queries of S stages: the label (num_classes for background), (S, B * N), and the target
            box, zero for background, (S, B * N, 4).
        """
        bboxes = torch.stack([output.bboxes for output in outputs], dim=1)
        scores = torch.stack([output.cls_score for output in outputs], dim=1).to(bboxes.dtype)
        batch, stages, num_queries, _ = bboxes.shape
        objects = [sample.gt_instances for sample in batch_data_samples]
        costs = []
        for b, (sample, gt) in enumerate(zip(batch_data_samples, objects, strict=True)):
            if len(gt):
                predicted = InstanceData(scores=scores[b].flatten(0, 1), bboxes=bboxes[b].flatten(0, 1))
                gt = InstanceData(labels=gt.labels, bboxes=gt.bboxes.to(bboxes.dtype))
                terms = [cost(predicted, gt, sample.metainfo) for cost in self.assigner.match_costs]
                costs.append(sum(terms).flatten())
        labels = bboxes.new_full((stages, batch, num_queries), self.num_classes, dtype=torch.long)
        targets = bboxes.new_zeros(stages, batch, num_queries, 4)
        if costs:
            host, matches, first = torch.cat(costs).cpu().numpy(), [], 0
            for b, gt in enumerate(objects):
                cost, host = np.split(host, [stages * num_queries * len(gt)])
                for s, stage_cost in enumerate(cost.reshape(stages, num_queries, len(gt))):
                    queries, matched = linear_sum_assignment(stage_cost)
                    matches.append(
                        np.stack([np.full_like(queries, s), np.full_like(queries, b), queries, matched + first])
                    )
                first += len(gt)
            s, b, queries, matched = torch.from_numpy(np.concatenate(matches, axis=1)).to(bboxes.device)
            labels[s, b, queries] = torch.cat([gt.labels for gt in objects])[matched]
            targets[s, b, queries] = torch.cat([gt.bboxes for gt in objects])[matched].to(targets.dtype)
        return labels.flatten(1), targets.flatten(1, 2)

    def stage_loss(
        self, output: StageOutput, labels: Tensor, targets: Tensor, batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        """Focal, L1 and GIoU loss of one stage, over the number of positives (mean over ranks, in all at least 1).

        L1 is taken on boxes divided by the image's (w, h, w, h), GIoU on pixel boxes. The sums are divided here,
        because the losses' own ``avg_factor`` adds a float32 epsilon to it.

        Args:
            output: what the stage predicts.
            labels, targets: one stage of what :meth:`assign` returns, (B * N,) and (B * N, 4).
            batch_data_samples: for the images' sizes.
        """
        positive = labels < self.num_classes
        # Over all ranks together at least 1: clamping the mean to 1 would divide by more than one process does.
        num_positive = reduce_mean(positive.sum().to(output.bboxes.dtype)).clamp(min=1 / get_world_size())
        cls_score, bboxes = output.cls_score.flatten(0, 1), output.bboxes.flatten(0, 1)
        losses = dict(
            loss_cls=self.loss_cls(cls_score, labels, reduction_override="sum") / num_positive,
            pos_acc=accuracy(cls_score[positive], labels[positive]),
        )
        size = bboxes.new_tensor([s.metainfo["img_shape"][1::-1] * 2 for s in batch_data_samples])
        size = size.repeat_interleave(output.bboxes.shape[1], dim=0)[positive]
        bboxes, targets = bboxes[positive], targets[positive]
        loss_bbox = self.loss_bbox(bboxes / size, targets / size, reduction_override="sum")
        loss_iou = self.loss_iou(bboxes, targets, reduction_override="sum")
        losses.update(loss_bbox=loss_bbox / num_positive, loss_iou=loss_iou / num_positive)
        return losses
