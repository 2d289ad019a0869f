"""A query's position (x, y, z, r): centre in input pixels, z = log2 of the box's scale, r = log2(h / w)."""

import math

import torch
from torch import Tensor


def xyzr_to_size(xyzr: Tensor) -> Tensor:
    """(..., 4) positions -> (..., 2) box sizes in pixels: w = 2^(z - r/2), h = 2^(z + r/2)."""
    z, r = xyzr[..., 2], xyzr[..., 3]
    return torch.exp2(torch.stack([z - r / 2, z + r / 2], dim=-1))


def xyzr_to_xyxy(xyzr: Tensor) -> Tensor:
    """(..., 4) positions -> (..., 4) boxes (x1, y1, x2, y2) in pixels."""
    centre, half = xyzr[..., :2], xyzr_to_size(xyzr) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def refine_xyzr(xyzr: Tensor, delta: Tensor) -> Tensor:
    """One refinement step: xy += delta_xy * 2^z, (z, r) += delta_zr. All (..., 4)."""
    centre = xyzr[..., :2] + delta[..., :2] * torch.exp2(xyzr[..., 2:3])
    return torch.cat([centre, xyzr[..., 2:] + delta[..., 2:]], dim=-1)


def log_iof(xyzr: Tensor) -> Tensor:
    """(B, N, 4) positions -> (B, N, N), log(IoF(box_i, box_j) + 1e-7): intersection over the area of box i."""
    low, high = xyzr_to_xyxy(xyzr).split(2, dim=-1)
    # Not mmdet's bbox_overlaps, whose constant has to wait for a GPU.
    shared = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])
    (w, h), (shared_w, shared_h) = (high - low).unbind(-1), shared.clamp(min=0).unbind(-1)
    return torch.log(shared_w * shared_h / (w * h).clamp(min=1e-6)[..., None] + 1e-7)


def position_encoding(xyzr: Tensor, dim: int) -> Tensor:
    """(..., 4) positions -> (..., dim): d/4 interleaved sin/cos features of each of (x/1000, y/1000, z, r)."""
    features = dim // 4
    pair = torch.arange(features, dtype=xyzr.dtype, device=xyzr.device) // 2
    frequency = torch.exp(pair * (-2 * math.log(10000) / features))
    scaled = torch.cat([xyzr[..., :2] * 1e-3, xyzr[..., 2:]], dim=-1)
    angle = scaled[..., None] * frequency
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-3)
