"""How 3D sampling reads the feature pyramid: three ways that give the same samples, each the fastest somewhere."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from torch import Tensor

from mmdet_lors.lors.recompute import recompute


class Pyramid(NamedTuple):
    """Feature levels, laid out once for all stages as a back end reads them; see :func:`arrange`."""

    features: tuple[Tensor, ...]
    """'grid_sample': L levels (B * G, C, H_l, W_l); 'deformable': one table of all cells (B, sum H_l W_l, G * C);
    'embedding_bag': the same, where every level has a border of zeros, (B, sum (H_l + 2) (W_l + 2), G * C)."""
    sizes: tuple[tuple[int, int], ...]
    """(H_l, W_l)."""
    strides: tuple[int, ...]
    """Pixels."""
    backend: str
    """Name in :data:`BACKENDS`."""


def arrange(feats: Sequence[Tensor], strides: Sequence[int], groups: int, backend: str = "auto") -> Pyramid:
    """Prepare feature levels for :func:`sample_3d`.

    Half precision is widened to float32: sampling stays in it, whatever the rest computes in.

    Args:
        feats: L levels (B, G * C, H_l, W_l), any memory format.
        strides: stride of each level in pixels.
        groups: G.
        backend: 'grid_sample' (PyTorch's, on any device and in any export), 'embedding_bag' (rows of a table: the
            fastest on a CPU), 'deformable' (mmcv's multi-scale deformable attention, one CUDA kernel), or 'auto': by
            device, and 'grid_sample' while an export traces.
    """
    if backend == "auto":
        device = feats[0].device.type
        backend = {"cuda": "deformable", "cpu": "embedding_bag"}.get(device, "grid_sample")
        if device == "mps" and torch.is_grad_enabled():  # where grid_sample has no backward pass, as of torch 2.11
            backend = "embedding_bag"
        if torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
            backend = "grid_sample"
    sizes = tuple(tuple(feat.shape[-2:]) for feat in feats)
    if feats[0].dtype in (torch.float16, torch.bfloat16):
        feats = [feat.float() for feat in feats]
    if backend == "grid_sample":
        features = tuple(feat.unflatten(1, (groups, -1)).flatten(0, 1) for feat in feats)
    else:
        if backend == "embedding_bag":
            feats = [F.pad(feat, (1, 1, 1, 1)) for feat in feats]
        features = (torch.cat([feat.flatten(2).transpose(1, 2) for feat in feats], dim=1),)
    return Pyramid(features, sizes, tuple(strides), backend)


def _level_grids(pyramid: Pyramid, xy: Tensor) -> list[Tensor]:
    """Positions in units of each level's extent, 0 to 1."""
    extents = [(width * s, height * s) for (height, width), s in zip(pyramid.sizes, pyramid.strides, strict=True)]
    return [xy / xy.new_tensor(extent) for extent in extents]


def _grid_sample(pyramid: Pyramid, xy: Tensor, weights: Tensor) -> Tensor:
    batch, _, groups = xy.shape[:3]
    sampled = 0
    for level, (feat, grid) in enumerate(zip(pyramid.features, _level_grids(pyramid, xy), strict=True)):
        grid = grid.transpose(1, 2).flatten(0, 1)
        weight = weights[..., level].transpose(1, 2).flatten(0, 1)
        sampled = sampled + recompute(_weighted_level, feat, grid, weight)
    return sampled.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)


def _weighted_level(feat: Tensor, grid: Tensor, weight: Tensor) -> Tensor:
    grid = (2 * grid - 1).to(feat.dtype)
    value = F.grid_sample(feat, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return value * weight[:, None].to(feat.dtype)


def _embedding_bag(pyramid: Pyramid, xy: Tensor, weights: Tensor) -> Tensor:
    """A point is the weighted sum of 4 L rows of the table: its four neighbours on every level.

    The zero border stands for everything outside a level: positions are clamped to it.
    """
    (table,) = pyramid.features
    batch, num_cells, channels = table.shape
    groups, device = xy.shape[2], xy.device
    widths, heights = ([size[i] + 2 for size in pyramid.sizes] for i in (1, 0))
    last = xy.new_tensor(list(zip(widths, heights, strict=True))) - 1
    cell = xy[..., None, :] / xy.new_tensor(pyramid.strides)[:, None] + 0.5  # (B, N, G, P, L, 2), in cells
    cell = torch.clamp(cell, torch.zeros_like(last), last)
    low = cell.detach().floor().minimum(last - 1)
    share_x, share_y = (cell - low).unbind(-1)

    def integers(values: Sequence[int], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device).view(shape)

    x, y = low.int().clamp(min=0).unbind(-1)
    cells = [width * height for width, height in zip(widths, heights, strict=True)]
    first = integers(list(itertools.accumulate([0, *cells[:-1]])), -1)
    image = integers([i * num_cells for i in range(batch)], -1, 1, 1, 1, 1)
    upper_left = (y * integers(widths, -1) + x + (image + first)) * groups + integers(range(groups), -1, 1, 1)
    corner = [(0, groups, width * groups, (width + 1) * groups) for width in widths]
    row = upper_left[..., None] + integers(corner, -1, 4)
    lower = weights * share_y
    upper = weights - lower
    upper_right, lower_right = upper * share_x, lower * share_x
    share = torch.stack([upper - upper_right, upper_right, lower - lower_right, lower_right], dim=-1)
    sampled = F.embedding_bag(
        row.flatten(0, 3).flatten(1),
        table.reshape(-1, channels // groups),
        per_sample_weights=share.flatten(0, 3).flatten(1).to(table.dtype),
        mode="sum",
    )
    return sampled.view(*xy.shape[:-1], -1)


def _deformable(pyramid: Pyramid, xy: Tensor, weights: Tensor) -> Tensor:
    """Every point is a query of its own, the groups are the heads, the level weights the attention."""
    (table,) = pyramid.features
    batch, num_queries, groups, num_points, _ = xy.shape
    shapes = torch.tensor(pyramid.sizes, device=xy.device)
    first = shapes.prod(dim=1).cumsum(dim=0) - shapes.prod(dim=1)
    grids = torch.stack(_level_grids(pyramid, xy), dim=-2)  # (B, N, G, P, L, 2)
    sampled = MultiScaleDeformableAttnFunction.apply(
        table.unflatten(-1, (groups, -1)),
        shapes,
        first,
        grids.transpose(2, 3).flatten(1, 2).unsqueeze(-2).contiguous(),  # (B, N * P, G, L, 1, 2)
        weights.transpose(2, 3).flatten(1, 2).unsqueeze(-1).contiguous(),  # (B, N * P, G, L, 1)
        batch,
    )
    return sampled.view(batch, num_queries, num_points, groups, -1).transpose(2, 3)


BACKENDS = {"grid_sample": _grid_sample, "embedding_bag": _embedding_bag, "deformable": _deformable}
