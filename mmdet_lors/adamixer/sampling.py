"""Adaptive 3D sampling: where a query looks in the feature pyramid, and what it finds there."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import xyzr_to_size


def level_weights(z: Tensor, strides: Sequence[int]) -> Tensor:
    """Softmax over levels of -(z - log2 stride_l)^2 / 2. (...) -> (..., L)."""
    level_z = z.new_tensor([math.log2(s) for s in strides])
    return F.softmax(-((z[..., None] - level_z) ** 2) / 2, dim=-1)


def sample_3d(feats: Sequence[Tensor], points: Tensor, strides: Sequence[int]) -> Tensor:
    """Bilinear samples of every level, summed with the level weights of each point's z.

    Group g reads its own contiguous slice of C channels. Outside a level lies zero; a level's extent is
    (width * stride, height * stride) pixels.

    Args:
        feats: L levels (B, G * C, H_l, W_l), any memory format.
        points: (B, N, G, P, 3), (x, y) in input pixels and z = log2 of the scale.
        strides: stride of each level in pixels.

    Returns:
        (B, N, G, P, C), in the features' data type.
    """
    batch, num_queries, groups, num_points, _ = points.shape
    weights = level_weights(points[..., 2], strides).permute(0, 2, 1, 3, 4).flatten(0, 1)
    xy = points[..., :2].transpose(1, 2).flatten(0, 1)
    sampled = 0
    for level, (feat, stride) in enumerate(zip(feats, strides, strict=True)):
        channels, height, width = feat.shape[1] // groups, *feat.shape[-2:]
        grid = xy * (2 / xy.new_tensor([width * stride, height * stride])) - 1
        value = F.grid_sample(
            feat.reshape(batch * groups, channels, height, width),
            grid.to(feat.dtype),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        sampled = sampled + value * weights[:, None, ..., level].to(feat.dtype)
    return sampled.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)


class AdaptiveSampling(nn.Module):
    """G x P points per query, placed relative to its box by offsets that its content generates.

    point = (centre + offset_xy * (w, h), z + offset_z).

    Args:
        content_dim: d.
        num_groups: G.
        num_points: P, points per group.
    """

    def __init__(self, content_dim: int, num_groups: int, num_points: int) -> None:
        super().__init__()
        self.num_groups, self.num_points = num_groups, num_points
        self.offset = nn.Linear(content_dim, num_groups * num_points * 3)

    def init_weights(self) -> None:
        """Weight zero; z bias -1; xy bias a regular grid on [-0.5, 0.5]^2 for a square P, else uniform there."""
        nn.init.zeros_(self.offset.weight)
        side = math.isqrt(self.num_points)
        if side * side == self.num_points:
            cells = (torch.arange(side, dtype=self.offset.bias.dtype) + 0.5) / side - 0.5
            y, x = torch.meshgrid(cells, cells, indexing="ij")
            xy = torch.stack([x, y], dim=-1).view(1, -1, 2).expand(self.num_groups, -1, 2)
        else:
            xy = torch.rand(self.num_groups, self.num_points, 2) - 0.5
        with torch.no_grad():
            bias = self.offset.bias.view(self.num_groups, self.num_points, 3)
            bias[..., :2] = xy
            bias[..., 2] = -1

    def points(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """Content (B, N, d) and positions (B, N, 4) -> points (B, N, G, P, 3), in the positions' data type."""
        offset = self.offset(content).to(xyzr.dtype)
        offset = offset.unflatten(-1, (self.num_groups, self.num_points, 3))
        xyzr = xyzr[:, :, None, None]
        xy = xyzr[..., :2] + offset[..., :2] * xyzr_to_size(xyzr)
        return torch.cat([xy, xyzr[..., 2:3] + offset[..., 2:]], dim=-1)

    def forward(self, feats: Sequence[Tensor], content: Tensor, xyzr: Tensor, strides: Sequence[int]) -> Tensor:
        """Sampled features (B, N, G, P, C); see :func:`sample_3d`."""
        return sample_3d(feats, self.points(content, xyzr), strides)
