"""3D sampling as one Triton kernel each way: the softmax over levels inside, nothing kept but the inputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

POINTS = 8
"""Points that one program samples, with a warp for every 32 channels."""


@triton.jit
def _level_weights(z, levels, L: tl.constexpr):
    """Largest logit and sum of the softmax over levels of -(z - log2 stride_l)^2 / 2."""
    most = z * 0 - float("inf")
    for level in tl.static_range(L):
        distance = z - tl.log2(tl.load(levels + 4 * level + 2).to(z.dtype))
        most = tl.maximum(most, -distance * distance / 2)
    total = z * 0
    for level in tl.static_range(L):
        distance = z - tl.log2(tl.load(levels + 4 * level + 2).to(z.dtype))
        total += tl.exp(-distance * distance / 2 - most)
    return most, total


@triton.jit
def _read(levels, level, x, y, z, most, total):
    """Of one level: width, stride, distance of z, weight; of each point: where its four cells are, and which exist.

    Where: the cell above and to the left, and the shares of its right and lower neighbours. Compared as floating-point
    numbers: a position far outside, or NaN, is never turned into an address.
    """
    width, height = tl.load(levels + 4 * level), tl.load(levels + 4 * level + 1)
    stride, first = tl.load(levels + 4 * level + 2), tl.load(levels + 4 * level + 3)
    distance = z - tl.log2(stride.to(z.dtype))
    weight = tl.exp(-distance * distance / 2 - most) / total
    x, y = x / stride.to(x.dtype) - 0.5, y / stride.to(x.dtype) - 0.5
    left, top = tl.floor(x), tl.floor(y)
    x0, x1 = (left >= 0) & (left < width), (left >= -1) & (left < width - 1)
    y0, y1 = (top >= 0) & (top < height), (top >= -1) & (top < height - 1)
    inside = (x0 | x1) & (y0 | y1)
    cell = first + tl.where(inside, top, 0).to(tl.int32) * width + tl.where(inside, left, 0).to(tl.int32)
    return width, stride, distance, weight, cell, x - left, y - top, x0 & y0, x1 & y0, x0 & y1, x1 & y1


@triton.jit
def _points(xy, z, count, per_image, cells, G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """M points of this program: index, whether there is one, position, and where its group's row of cell 0 begins."""
    point = tl.program_id(0) * M + tl.arange(0, M)
    exists = point < count
    x = tl.load(xy + 2 * point.to(tl.int64), mask=exists, other=0)
    y = tl.load(xy + 2 * point.to(tl.int64) + 1, mask=exists, other=0)
    z = tl.load(z + point, mask=exists, other=0)
    image, group = (point // per_image).to(tl.int64), (point // P) % G
    return point, exists, x, y, z, (image * cells * G + group) * C


@triton.jit
def _forward(
    table, levels, xy, z, out, count, per_image, cells,
    L: tl.constexpr, G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    point, exists, x, y, z, row = _points(xy, z, count, per_image, cells, G, P, C, M)
    most, total = _level_weights(z, levels, L)
    channel = tl.arange(0, WIDTH)[None, :]
    sampled = tl.zeros((M, WIDTH), dtype=z.dtype)
    for level in tl.static_range(L):
        width, stride, distance, weight, cell, right, low, i00, i01, i10, i11 = _read(
            levels, level, x, y, z, most, total
        )
        address = table + (row + cell * (G * C))[:, None] + channel
        wanted = exists[:, None] & (channel < C)
        v00 = tl.load(address, mask=wanted & i00[:, None], other=0).to(z.dtype)
        v01 = tl.load(address + G * C, mask=wanted & i01[:, None], other=0).to(z.dtype)
        v10 = tl.load(address + width * (G * C), mask=wanted & i10[:, None], other=0).to(z.dtype)
        v11 = tl.load(address + (width + 1) * (G * C), mask=wanted & i11[:, None], other=0).to(z.dtype)
        lower, upper = (weight * low)[:, None], (weight * (1 - low))[:, None]
        right = right[:, None]
        sampled += upper * (v00 + right * (v01 - v00)) + lower * (v10 + right * (v11 - v10))
    place = out + point.to(tl.int64)[:, None] * C + channel
    tl.store(place, sampled.to(out.dtype.element_ty), mask=exists[:, None] & (channel < C))


@triton.jit
def _backward(
    table, levels, xy, z, grad, grad_table, grad_xy, grad_z, count, per_image, cells,
    L: tl.constexpr, G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    grad_z_of = grad_z
    point, exists, x, y, z, row = _points(xy, z, count, per_image, cells, G, P, C, M)
    most, total = _level_weights(z, levels, L)
    channel = tl.arange(0, WIDTH)[None, :]
    wanted = exists[:, None] & (channel < C)
    grad = tl.load(grad + point.to(tl.int64)[:, None] * C + channel, mask=wanted, other=0).to(z.dtype)
    grad_x, grad_y = z * 0, z * 0
    # With weights w_l, samples s_l and slopes t_l = -(z - log2 stride_l) of the logits:
    # d/dz sum_l w_l s_l = sum_l w_l s_l t_l - (sum_l w_l s_l) (sum_l w_l t_l).
    ws, wst, wt = z * 0, z * 0, z * 0
    for level in tl.static_range(L):
        width, stride, distance, weight, cell, right, low, i00, i01, i10, i11 = _read(
            levels, level, x, y, z, most, total
        )
        here = (row + cell * (G * C))[:, None] + channel
        m00, m01, m10, m11 = wanted & i00[:, None], wanted & i01[:, None], wanted & i10[:, None], wanted & i11[:, None]
        d00 = tl.sum(tl.load(table + here, mask=m00, other=0).to(z.dtype) * grad, axis=1)
        d01 = tl.sum(tl.load(table + here + G * C, mask=m01, other=0).to(z.dtype) * grad, axis=1)
        d10 = tl.sum(tl.load(table + here + width * (G * C), mask=m10, other=0).to(z.dtype) * grad, axis=1)
        d11 = tl.sum(tl.load(table + here + (width + 1) * (G * C), mask=m11, other=0).to(z.dtype) * grad, axis=1)
        upper = d00 + right * (d01 - d00)
        lower = d10 + right * (d11 - d10)
        sample = upper + low * (lower - upper)
        ws += weight * sample
        wst -= weight * sample * distance
        wt -= weight * distance
        scale = weight / stride.to(z.dtype)
        grad_x += scale * ((1 - low) * (d01 - d00) + low * (d11 - d10))
        grad_y += scale * (lower - upper)
        c00, c01 = weight * (1 - right) * (1 - low), weight * right * (1 - low)
        c10, c11 = weight * (1 - right) * low, weight * right * low
        tl.atomic_add(grad_table + here, c00[:, None] * grad, mask=m00, sem="relaxed")
        tl.atomic_add(grad_table + here + G * C, c01[:, None] * grad, mask=m01, sem="relaxed")
        tl.atomic_add(grad_table + here + width * (G * C), c10[:, None] * grad, mask=m10, sem="relaxed")
        tl.atomic_add(grad_table + here + (width + 1) * (G * C), c11[:, None] * grad, mask=m11, sem="relaxed")
    tl.store(grad_xy + 2 * point.to(tl.int64), grad_x, mask=exists)
    tl.store(grad_xy + 2 * point.to(tl.int64) + 1, grad_y, mask=exists)
    tl.store(grad_z_of + point, wst - ws * wt, mask=exists)


def _launch(kernel, table: Tensor, levels: Tensor, xy: Tensor, z: Tensor, *tensors: Tensor) -> None:
    _, num_queries, groups, num_points = z.shape
    channels, count = table.shape[2] // groups, z.numel()
    width = triton.next_power_of_2(channels)
    if count:
        with torch.cuda.device_of(table):
            kernel[(triton.cdiv(count, POINTS),)](
                table, levels, xy, z, *tensors, count, num_queries * groups * num_points, table.shape[1],
                L=len(levels), G=groups, P=num_points, C=channels, M=POINTS,
                WIDTH=width, num_warps=min(max(width // 32, 1), 8),
            )  # fmt: skip


@torch.library.custom_op("mmdet_lors::sample_3d", mutates_args=())
def sample_3d(table: Tensor, levels: Tensor, xy: Tensor, z: Tensor) -> Tensor:
    """Bilinear samples of every level, summed with the softmax over levels of -(z - log2 stride_l)^2 / 2.

    Differentiable in ``table``, ``xy`` and ``z``. The table's gradient is summed in float32 (or float64), in no fixed
    order.

    Args:
        table: all cells of all levels, (B, sum H_l W_l, G * C), contiguous; float16, bfloat16, float32 or float64.
            Fastest where C is a multiple of 8.
        levels: (L, 4), int32: W_l, H_l, stride in pixels, first cell.
        xy: (B, N, G, P, 2), in pixels; float64 if the table is, else float32.
        z: (B, N, G, P), in the same.

    Returns:
        (B, N, G, P, C), in the table's data type.
    """
    out = table.new_empty(*z.shape, table.shape[2] // z.shape[2])
    _launch(_forward, table, levels, xy.contiguous(), z.contiguous(), out)
    return out


@sample_3d.register_fake
def _(table: Tensor, levels: Tensor, xy: Tensor, z: Tensor) -> Tensor:
    return table.new_empty(*z.shape, table.shape[2] // z.shape[2])


@torch.library.custom_op("mmdet_lors::sample_3d_backward", mutates_args=())
def _sample_3d_backward(
    table: Tensor, levels: Tensor, xy: Tensor, z: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.zeros_like(table, dtype=z.dtype), torch.empty_like(xy), torch.empty_like(z)
    _launch(_backward, table, levels, xy, z, grad.contiguous(), *grads)
    return grads[0].to(table.dtype), *grads[1:]


@_sample_3d_backward.register_fake
def _(table: Tensor, levels: Tensor, xy: Tensor, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(xy), torch.empty_like(z)


def _keep(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    table, levels, xy, z = inputs
    ctx.save_for_backward(table, levels, xy.contiguous(), z.contiguous())


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, xy, z = _sample_3d_backward(*ctx.saved_tensors, grad)
    return table, None, xy, z


sample_3d.register_autograd(_gradients, setup_context=_keep)
