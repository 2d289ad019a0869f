"""The decoder: S stages that refine the queries, their losses, and the detections of the last one."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from mmdet.models.losses import accuracy
from mmdet.models.task_modules.assigners import HungarianAssigner
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures import SampleList
from mmdet.structures.bbox import scale_boxes
from mmdet.utils import reduce_mean
from mmengine.config import ConfigDict
from mmengine.dist import get_world_size
from mmengine.model import BaseModule, ModuleList
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mmdet_lors.errors import UserError
from mmdet_lors.lors import LORSA, LORST

from .boxes import xyzr_to_xyxy
from .sampling import BACKENDS, arrange

LORS_FIELDS = {
    "adaptive": ("rank", "groups", "shared", "shared_init", "path"),
    "static": ("rank", "groups", "shared", "path"),
}


class StageOutput(NamedTuple):
    """What one stage predicts."""

    cls_score: Tensor
    """Class logits (B, N, num_classes)."""
    xyzr: Tensor
    """Refined positions (B, N, 4)."""
    bboxes: Tensor
    """The same as boxes (x1, y1, x2, y2) in input pixels, (B, N, 4)."""
    content: Tensor
    """Content (B, N, d)."""


def check_lors(lors: dict | None) -> dict[str, dict]:
    """The halves of a ``lors`` field that are switched on.

    Raises:
        UserError: an unknown half or field, a half that is no dict, or no half at all.
    """
    if lors is None:
        return {}
    halves = {name: half for name, half in lors.items() if half is not None}
    if not halves:
        raise UserError("lors is empty: name 'adaptive', 'static' or both, or set lors=None")
    for name, half in halves.items():
        if name not in LORS_FIELDS:
            raise UserError(f"lors.{name} is unknown; known: {', '.join(LORS_FIELDS)}")
        if not isinstance(half, dict):
            raise UserError(f"lors.{name} must be a dict, got {half!r}")
        for field in half:
            if field not in LORS_FIELDS[name]:
                raise UserError(f"lors.{name}.{field} is unknown; known: {', '.join(LORS_FIELDS[name])}")
    return halves


@MODELS.register_module()
class AdaMixerDecoder(BaseModule):
    """AdaMixer's decoder, plain or with LORS.

    Args:
        num_stages: S.
        num_classes: classes, without background.
        featmap_strides: stride of each feature level in pixels.
        stage: config of the stages, all alike.
        lors: ``dict(adaptive=dict(rank, groups, shared, shared_init, path), static=dict(rank, groups, shared, path))``:
            'adaptive' makes M and S of all stages with one LORSA, 'static' their output projections with one
            LORST. Either half may be left out; ``rank`` and ``groups`` are one integer or one per stage.
        loss_cls, loss_bbox, loss_iou: losses of every stage.
        sampling: back end of 3D sampling, see :func:`mmdet_lors.adamixer.sampling.arrange`.
        compile: compile every stage with ``torch.compile``, as one graph each; a dict holds its arguments.
        train_cfg: ``dict(assigner=...)``, a Hungarian assigner; its match costs are used.
        test_cfg: ``dict(max_per_img=...)``.

    Raises:
        UserError: a ``lors`` field that is unknown or does not fit the stages, or a stage that cannot be built.
    """

    def __init__(
        self,
        num_stages: int,
        num_classes: int,
        featmap_strides: Sequence[int],
        stage: dict,
        loss_cls: dict,
        loss_bbox: dict,
        loss_iou: dict,
        lors: dict | None = None,
        sampling: str = "auto",
        compile: bool | dict = False,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if sampling not in ("auto", *BACKENDS):
            raise UserError(f"decoder.sampling must be one of auto, {', '.join(BACKENDS)}, got {sampling!r}")
        self.sampling = sampling
        self.num_classes, self.featmap_strides = num_classes, list(featmap_strides)
        self.max_per_img = (test_cfg or {}).get("max_per_img", 100)
        self.assigner = TASK_UTILS.build(train_cfg["assigner"]) if train_cfg else None
        if train_cfg and not isinstance(self.assigner, HungarianAssigner):
            raise UserError(f"train_cfg.assigner must be a HungarianAssigner, got {type(self.assigner).__name__}")
        self.loss_cls = MODELS.build(loss_cls)
        self.loss_bbox = MODELS.build(loss_bbox)
        self.loss_iou = MODELS.build(loss_iou)

        halves = check_lors(lors)
        stage = ConfigDict(
            stage,
            num_classes=num_classes,
            own_generator="adaptive" not in halves,
            own_out_proj="static" not in halves,
        )
        self.stages = ModuleList(MODELS.build(stage) for _ in range(num_stages))
        if compile:
            for built in self.stages:
                built.compile(fullgraph=True, **(compile if isinstance(compile, dict) else {}))
        mixing = self.stages[0].mixing
        content_dim = mixing.norm.normalized_shape[0]
        self.lorsa, self.lorst = None, None
        if "adaptive" in halves:
            self.lorsa = self._build_half(
                "adaptive", partial(LORSA, content_dim, mixing.shapes, mixing.copies, num_stages), halves
            )
        if "static" in halves:
            self.lorst = self._build_half(
                "static", partial(LORST, mixing.out_features, content_dim, num_stages), halves
            )

    @staticmethod
    def _build_half(name: str, build: partial, halves: dict[str, dict]) -> nn.Module:
        try:
            return build(**halves[name])
        except ValueError as error:
            raise UserError(f"lors.{name}.{error}") from error

    def init_weights(self) -> None:
        """Initialise the stages, then what LORS shares between them."""
        super().init_weights()
        for half in (self.lorsa, self.lorst):
            if half is not None:
                half.reset_parameters()

    def forward(self, feats: Sequence[Tensor], xyzr: Tensor, content: Tensor) -> list[StageOutput]:
        """Run all stages; each starts from the detached positions of the one before.

        Args:
            feats: L levels (B, feat_channels, H_l, W_l).
            xyzr: initial positions (B, N, 4).
            content: initial content (B, N, d).

        Returns:
            One :class:`StageOutput` per stage.
        """
        if len(feats) != len(self.featmap_strides):
            raise UserError(
                f"decoder.featmap_strides has {len(self.featmap_strides)} entries for {len(feats)} feature levels"
            )
        pyramid = arrange(feats, self.featmap_strides, self.stages[0].mixing.copies, self.sampling)
        generators = self.lorsa and self.lorsa.for_pass()
        projections = self.lorst and self.lorst.for_pass()
        outputs = []
        for i, stage in enumerate(self.stages):
            generate = self.lorsa and partial(self.lorsa, layer=i, folded=generators)
            project = self.lorst and partial(self.lorst, layer=i, folded=projections)
            cls_score, xyzr, content = stage(pyramid, xyzr, content, generate, project)
            outputs.append(StageOutput(cls_score, xyzr, xyzr_to_xyxy(xyzr), content))
            xyzr = xyzr.detach()
        return outputs

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

    def predict(
        self,
        feats: Sequence[Tensor],
        xyzr: Tensor,
        content: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = True,
    ) -> list[InstanceData]:
        """Detections of the last stage: sigmoid scores, the ``max_per_img`` best over queries x classes, no NMS.

        Returns:
            Per image: scores (n,), labels (n,), bboxes (n, 4), in the original image's pixels with ``rescale``.
        """
        output = self(feats, xyzr, content)[-1]
        results = []
        for cls_score, bboxes, sample in zip(output.cls_score, output.bboxes, batch_data_samples, strict=True):
            scores = cls_score.sigmoid().flatten()
            scores, index = scores.topk(min(self.max_per_img, len(scores)))
            bboxes = bboxes[index // self.num_classes]
            if rescale:
                w, h = sample.metainfo["scale_factor"]
                bboxes = scale_boxes(bboxes, (1 / w, 1 / h))
            results.append(InstanceData(scores=scores, labels=index % self.num_classes, bboxes=bboxes))
        return results
