"""Adaptive 3D sampling: where a query looks in the feature pyramid, and what it finds there."""

import math

import torch
from torch import Tensor, nn

from ..boxes import xyzr_to_size
from ..precision import full_precision
from .backends import BACKENDS, Pyramid


def sample_3d(pyramid: Pyramid, points: Tensor) -> Tensor:
    """Bilinear samples of every level, summed with the level weights of each point's z.

    Group g reads its own contiguous slice of C channels. Outside a level lies zero; a level's extent is
    (width * stride, height * stride) pixels. Apart from ``points`` and their weights, nothing that a back end keeps for
    the backward pass grows with the number of levels.

    Args:
        pyramid: what :func:`arrange` returned.
        points: (B, N, G, P, 3), (x, y) in input pixels and z = log2 of the scale; float32 or wider.

    Returns:
        (B, N, G, P, C), in the features' data type.
    """
    return BACKENDS[pyramid.backend](pyramid, points[..., :2], points[..., 2])


class AdaptiveSampling(nn.Module):
    """G x P points per query, placed relative to its box by offsets that its content generates.

    point = (centre + offset_xy * (w, h), z + offset_z), in float32 under mixed precision.

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
        offset = full_precision(self.offset, content)
        offset = offset.unflatten(-1, (self.num_groups, self.num_points, 3))
        xyzr = xyzr[:, :, None, None]
        xy = xyzr[..., :2] + offset[..., :2] * xyzr_to_size(xyzr)
        return torch.cat([xy, xyzr[..., 2:3] + offset[..., 2:]], dim=-1)

    def forward(self, pyramid: Pyramid, content: Tensor, xyzr: Tensor) -> Tensor:
        """Sampled features (B, N, G, P, C); see :func:`sample_3d`."""
        return sample_3d(pyramid, self.points(content, xyzr))
