"""How 3D sampling reads the feature pyramid: four ways that give the same samples, each the fastest somewhere."""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.ops import get_compiling_cuda_version
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmengine.logging import print_log
from torch import Tensor

from mmdet_lors.errors import UserError, first_line
from mmdet_lors.lors.recompute import recompute
from mmdet_lors.transfer import to_device


class Pyramid(NamedTuple):
    """Feature levels, laid out once for all stages as a back end reads them; see :func:`arrange`."""

    features: tuple[Tensor, ...]
    """'grid_sample': L levels (B * G, C, H_l, W_l); the others: one table of all cells, (B, sum H_l W_l, G * C), where
    'embedding_bag' has a border of zeros around every level."""
    levels: Tensor
    """W_l, H_l (with the border), stride in pixels, and first cell; (L, 4), int32, on the features' device."""
    backend: str
    """Name in :data:`BACKENDS`."""


def arrange(feats: Sequence[Tensor], strides: Sequence[int], groups: int, backend: str = "auto") -> Pyramid:
    """Prepare feature levels for :func:`sample_3d`.

    Half precision is widened to float32, except for 'triton', which reads it and computes in float32.

    Args:
        feats: L levels (B, G * C, H_l, W_l), any memory format.
        strides: stride of each level in pixels.
        groups: G.
        backend: a name in :data:`BACKENDS`, or 'auto', see :func:`choose`.

    Raises:
        UserError: a back end that does not run here.
    """
    device = feats[0].device
    if backend == "auto":
        backend = choose(device)
    elif backend in NEEDS and (missing := NEEDS[backend](device)):
        raise UserError(f"decoder.sampling {backend!r} does not run on {device}: {missing}")
    if feats[0].dtype in (torch.float16, torch.bfloat16) and backend != "triton":
        feats = [feat.float() for feat in feats]
    if backend == "embedding_bag":
        feats = [F.pad(feat, (1, 1, 1, 1)) for feat in feats]
    levels, first = [], 0
    for feat, stride in zip(feats, strides, strict=True):
        height, width = feat.shape[-2:]
        levels.append((width, height, stride, first))
        first += width * height
    if backend == "grid_sample":
        features = tuple(feat.unflatten(1, (groups, -1)).flatten(0, 1) for feat in feats)
    else:
        features = (torch.cat([feat.flatten(2).transpose(1, 2) for feat in feats], dim=1),)
    return Pyramid(features, to_device(levels, feats[0], torch.int32), backend)


def choose(device: torch.device) -> str:
    """The fastest back end that runs here, and 'grid_sample', PyTorch's own, while an export traces."""
    if torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
        return "grid_sample"
    # As of torch 2.11, grid_sample has no backward pass on MPS, and none that is deterministic on CUDA.
    no_grid_sample = device.type == "mps" and torch.is_grad_enabled()
    if device.type == "cpu" or no_grid_sample or torch.are_deterministic_algorithms_enabled():
        return "embedding_bag"
    if device.type == "cuda":
        return next((name for name, missing in NEEDS.items() if not missing(device)), "grid_sample")
    return "grid_sample"


def level_weights(z: Tensor, strides: Tensor) -> Tensor:
    """Softmax over levels of -(z - log2 stride_l)^2 / 2. (...) and (L,) -> (..., L)."""
    return F.softmax(-((z[..., None] - strides.to(z.dtype).log2()) ** 2) / 2, dim=-1)


def _level_grids(levels: Tensor, xy: Tensor) -> Tensor:
    """Positions in units of each level's extent, 0 to 1: (..., 2) -> (..., L, 2)."""
    return xy[..., None, :] / (levels[:, :2] * levels[:, 2:3])


def _grid_sample(pyramid: Pyramid, xy: Tensor, z: Tensor) -> Tensor:
    batch, _, groups = z.shape[:3]
    grids = _level_grids(pyramid.levels, xy).transpose(1, 2).flatten(0, 1).unbind(-2)
    weights = level_weights(z, pyramid.levels[:, 2]).transpose(1, 2).flatten(0, 1).unbind(-1)
    levels = zip(pyramid.features, grids, weights, strict=True)
    size = z.numel() * pyramid.features[0].shape[1]
    sampled = reduce(torch.add, (recompute(_weighted_level, *level, instead_of=size) for level in levels))
    return sampled.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)


def _weighted_level(feat: Tensor, grid: Tensor, weight: Tensor) -> Tensor:
    grid = (2 * grid - 1).to(feat.dtype)
    value = F.grid_sample(feat, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return value * weight[:, None].to(feat.dtype)


def _embedding_bag(pyramid: Pyramid, xy: Tensor, z: Tensor) -> Tensor:
    """A point is the weighted sum of 4 L rows of the table: its four neighbours on every level.

    The zero border stands for everything outside a level: positions are clamped to it.
    """
    (table,) = pyramid.features
    batch, num_cells, channels = table.shape
    groups, arange = z.shape[2], partial(torch.arange, dtype=torch.int32, device=z.device)
    width, _, stride, first = pyramid.levels.unbind(1)
    last = (pyramid.levels[:, :2] - 1).to(xy.dtype)
    cell = xy[..., None, :] / stride[:, None] + 0.5  # (B, N, G, P, L, 2), in cells
    cell = torch.clamp(cell, torch.zeros_like(last), last)
    low = cell.detach().floor().minimum(last - 1)
    share_x, share_y = (cell - low).unbind(-1)

    x, y = low.int().clamp(min=0).unbind(-1)
    image = arange(0, batch * num_cells, num_cells).view(-1, 1, 1, 1, 1)
    group = arange(groups).view(-1, 1, 1)
    upper_left = (y * width + x + (image + first)) * groups + group
    corner = torch.stack([width * 0, width * 0 + 1, width, width + 1], dim=-1) * groups
    row = upper_left[..., None] + corner
    weights = level_weights(z, stride)
    lower = weights * share_y
    upper = weights - lower
    upper_right, lower_right = upper * share_x, lower * share_x
    share = torch.stack([upper - upper_right, upper_right, lower - lower_right, lower_right], dim=-1)
    table = table.reshape(-1, channels // groups)
    row, share = row.flatten(0, 3).flatten(1), share.flatten(0, 3).flatten(1).to(table.dtype)
    sampled = F.embedding_bag(row, table.detach(), per_sample_weights=share, mode="sum")
    if table.requires_grad:
        sampled = _WithTable.apply(sampled, table, row, share)
    return sampled.view(*z.shape, channels // groups)


class _WithTable(torch.autograd.Function):
    """``sampled`` as it is; to the backward pass, its derivative by the table.

    A row's gradient is the weighted sum of the points' that read it, which is an embedding bag as well, with a bag for
    each row: the same sums as in `embedding_bag`'s own backward pass, in a third of its time on a CPU.
    """

    @staticmethod
    def forward(ctx, sampled: Tensor, table: Tensor, row: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(row, share)
        ctx.num_rows = len(table)
        return sampled.view_as(sampled)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        row, share = ctx.saved_tensors
        rows, order = row.flatten().sort(stable=True)
        first = torch.searchsorted(rows, torch.arange(ctx.num_rows, dtype=rows.dtype, device=rows.device))
        share = share.flatten().index_select(0, order)
        table = F.embedding_bag(order // row.shape[1], gradient, first, per_sample_weights=share, mode="sum")
        return gradient, table, None, None


def _deformable(pyramid: Pyramid, xy: Tensor, z: Tensor) -> Tensor:
    """Every point is a query of its own, the groups are the heads, the level weights the attention."""
    (table,) = pyramid.features
    batch, num_queries, groups, num_points = z.shape
    levels = pyramid.levels.long()
    grids, weights = _level_grids(levels, xy), level_weights(z, levels[:, 2])
    sampled = MultiScaleDeformableAttnFunction.apply(
        table.unflatten(-1, (groups, -1)),
        levels[:, :2].flip(1),
        levels[:, 3].contiguous(),
        grids.transpose(2, 3).flatten(1, 2).unsqueeze(-2).contiguous(),  # (B, N * P, G, L, 1, 2)
        weights.transpose(2, 3).flatten(1, 2).unsqueeze(-1).contiguous(),  # (B, N * P, G, L, 1)
        batch,
    )
    return sampled.view(batch, num_queries, num_points, groups, -1).transpose(2, 3)


def _triton(pyramid: Pyramid, xy: Tensor, z: Tensor) -> Tensor:
    from .kernel import sample_3d

    return sample_3d(*pyramid.features, pyramid.levels, xy, z)


def _no_cuda_operators(device: torch.device) -> str:
    """Why mmcv's CUDA operators do not run here, or nothing."""
    if device.type != "cuda":
        return "it is a CUDA operator"
    return "mmcv was built without CUDA operators" if get_compiling_cuda_version() == "not available" else ""


@cache
def _no_triton(device: torch.device) -> str:
    """Why Triton's kernels do not run here, or nothing: found by running one, which also needs a C compiler."""
    if device.type in ("mps", "meta"):
        return "Triton has no kernels for it"
    zeros = torch.zeros(1, 1, 1, 1, 8, device=device)
    levels = torch.ones(1, 4, dtype=torch.int32, device=device)
    try:
        _triton(Pyramid((zeros[0, 0],), levels, "triton"), zeros[..., :2], zeros[..., 0])
    except Exception as error:
        why = first_line(error)
        if device.type == "cuda":
            print_log(f"3D sampling is slower: no Triton kernel runs on {device}: {why}", "current", logging.WARNING)
        return why
    return ""


BACKENDS: dict[str, Callable[[Pyramid, Tensor, Tensor], Tensor]] = {
    "grid_sample": _grid_sample,
    "embedding_bag": _embedding_bag,
    "deformable": _deformable,
    "triton": _triton,
}
"""'grid_sample' runs on any device and in any export; 'embedding_bag' reads rows of a table, the fastest on a CPU;
'deformable' is mmcv's multi-scale deformable attention, compiled for CUDA; 'triton' is our own kernel."""

NEEDS: dict[str, Callable[[torch.device], str]] = {"triton": _no_triton, "deformable": _no_cuda_operators}
"""Why a back end does not run on a device, empty if it does; those that GPUs have, the fastest first."""
