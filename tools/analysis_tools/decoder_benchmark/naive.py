"""The benchmark's baseline: AdaMixer's decoder with LORS in its most direct form.

Every query builds its own B E A, concatenated with the shared weight and summed; every level is sampled and weighted
on its own, in every stage; every stage and image is matched by its own call of mmdet's assigner. It has the weights
and results of mmdet_lors.adamixer.AdaMixerDecoder, and exists only to be compared with it in speed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.structures import SampleList
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_lors.adamixer import AdaMixerDecoder
from mmdet_lors.adamixer.boxes import refine_xyzr, xyzr_to_xyxy
from mmdet_lors.adamixer.criterion import Matching
from mmdet_lors.adamixer.decoder import StageOutput
from mmdet_lors.adamixer.sampling.backends import level_weights


class NaiveDecoder(AdaMixerDecoder):
    """AdaMixer's decoder without any of this project's savings."""

    def forward(self, feats: Sequence[Tensor], xyzr: Tensor, content: Tensor) -> list[StageOutput]:
        """Like the decoder's own forward: one output per stage."""
        outputs = []
        for i, stage in enumerate(self.stages):
            content = stage.attention_norm(stage.attention(content, xyzr))
            sampled = self.sample(feats, stage.sampling.points(content, xyzr))
            M, S = self.generate(content, i)
            x = sampled @ M
            x = F.relu(F.layer_norm(x, x.shape[-2:]))
            x = S @ x
            x = F.relu(F.layer_norm(x, x.shape[-2:])).flatten(2)
            content = stage.mixing.norm(content + self.project(x, i))
            content = stage.ffn_norm(stage.ffn(content))
            cls_score, xyzr = stage.cls_branch(content), refine_xyzr(xyzr, stage.reg_branch(content))
            outputs.append(StageOutput(cls_score, xyzr, xyzr_to_xyxy(xyzr), content))
            xyzr = xyzr.detach()
        return outputs

    def sample(self, feats: Sequence[Tensor], points: Tensor) -> Tensor:
        """Call grid_sample once per level, and multiply its result by the level's weight."""
        batch, _, groups, _, _ = points.shape
        weights = level_weights(points[..., 2], points.new_tensor(self.featmap_strides))
        sampled = 0
        for level, (feat, stride) in enumerate(zip(feats, self.featmap_strides, strict=True)):
            extent = points.new_tensor([feat.shape[-1] * stride, feat.shape[-2] * stride])
            grid = (points[..., :2] / extent * 2 - 1).transpose(1, 2).flatten(0, 1)
            value = F.grid_sample(feat.reshape(batch * groups, -1, *feat.shape[-2:]), grid, align_corners=False)
            weight = weights[..., level].transpose(1, 2).flatten(0, 1)
            sampled = sampled + value * weight[:, None]
        return sampled.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)

    def generate(self, query: Tensor, layer: int) -> list[Tensor]:
        """M and S: the shared weight and every B E A, concatenated and summed."""
        if self.lorsa is None:
            return self.stages[layer].mixing.parameter_generator(query)
        private, weights = self.lorsa.private[layer], []
        for common, B, E, A in zip(self.lorsa.shared(query), private.B, private.E(query), private.A, strict=True):
            parts = [common]
            E = E.unflatten(2, (self.lorsa.copies, private.groups))
            for k in range(private.groups):
                rank = slice(k * private.rank, (k + 1) * private.rank)
                parts.append(B[:, :, rank] @ E[:, :, :, k] @ A[:, rank])
            weights.append(torch.cat([part.unsqueeze(0) for part in parts]).sum(0))
        return weights

    def project(self, x: Tensor, layer: int) -> Tensor:
        """The output projection, with its weight shared + B A formed."""
        if self.lorst is None:
            return self.stages[layer].mixing.out_proj(x)
        private = self.lorst.private[layer]
        return F.linear(x, self.lorst.shared + private.B @ private.A, self.lorst.bias[layer])

    @torch.no_grad()
    def assign(self, outputs: Sequence[StageOutput], batch_data_samples: SampleList) -> Matching:
        """Match stage by stage and image by image with mmdet's assigner, each call with a transfer to the host."""
        found = []
        for output in outputs:
            for b, (scores, bboxes, sample) in enumerate(
                zip(output.cls_score, output.bboxes, batch_data_samples, strict=True)
            ):
                gt = InstanceData(labels=sample.gt_instances.labels, bboxes=sample.gt_instances.bboxes.to(bboxes.dtype))
                index = self.assigner.assign(InstanceData(scores=scores, bboxes=bboxes), gt, sample.metainfo).gt_inds
                queries = (index > 0).nonzero().squeeze(1)
                objects = index[queries] - 1
                found.append((queries + b * len(bboxes), gt.labels[objects], gt.bboxes[objects]))
        return Matching(*(torch.cat(parts).unflatten(0, (len(outputs), -1)) for parts in zip(*found, strict=True)))
