"""A linear map with a weight that a stack of layers shares, and, optionally, a low-rank residual of the layer's own.

Autograd gives every use of a shared weight a gradient of its own, as large as the weight, and adds them up. Here each
layer's backward pass adds its product to one buffer instead, in the same matrix product; likewise the residual's part
of the input's gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class SharedWeight:
    """One forward pass's view of a shared weight, (out, in), and the buffer in which its gradient adds up.

    Not within what torch.compile compiles, which cannot trace a buffer that backward passes write to.
    """

    def __init__(self, weight: Tensor) -> None:
        self.gradient: Tensor | None = None
        self.weight = _Collect.apply(weight, self)

    @staticmethod
    def of(weight: Tensor) -> "SharedWeight | None":
        """None where it would not help (no gradient is wanted, half precision) or cannot be (compiled, meta)."""
        wanted = torch.is_grad_enabled() and weight.requires_grad
        if not wanted or torch.compiler.is_compiling() or weight.is_meta:
            return None
        return None if torch.is_autocast_enabled(weight.device.type) else SharedWeight(weight)

    def linear(self, x: Tensor, bias: Tensor | None, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        """x (W + B A)^T + b. (..., in) -> (..., out); A is (rank, in), B (out, rank)."""
        out = _SharedLinear.apply(x.flatten(0, -2), self.weight, bias, A, B, self)
        return out.unflatten(0, x.shape[:-1])


class _Collect(torch.autograd.Function):
    """The identity; hands the buffer on when every layer has added to it."""

    @staticmethod
    def forward(ctx, weight: Tensor, shared: SharedWeight) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared = shared
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        collected, ctx.shared.gradient = ctx.shared.gradient, None
        if gradient is not None and collected is not None:
            collected = collected + gradient
        return gradient if collected is None else collected, None


class _SharedLinear(torch.autograd.Function):
    """See :meth:`SharedWeight.linear`; x is (n, in)."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, shared: SharedWeight
    ) -> Tensor:
        hidden = None if A is None else x @ A.T
        ctx.save_for_backward(x, weight, A, B, hidden)
        ctx.shared = shared
        out = F.linear(x, weight, bias)
        return out if hidden is None else out.addmm_(hidden, B.T)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, hidden = ctx.saved_tensors
        for_x, for_weight, for_bias, for_A, for_B, _ = ctx.needs_input_grad
        dx = g @ weight if for_x else None
        if for_weight and ctx.shared.gradient is None:
            ctx.shared.gradient = g.T @ x
        elif for_weight:
            ctx.shared.gradient.addmm_(g.T, x)
        dA = dB = None
        if A is not None:
            gB = g @ B
            dx = dx.addmm_(gB, A) if for_x else None
            dA = gB.T @ x if for_A else None
            dB = g.T @ hidden if for_B else None
        return dx, None, g.sum(0) if for_bias else None, dA, dB, None
