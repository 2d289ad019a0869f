"""Trading memory for arithmetic where arithmetic is the cheaper of the two."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def small(device: torch.device) -> int:
    """As many numbers are computed again: 64 MB on a CPU, which has much memory and computes slowly, else 16 MB."""
    return 1 << 24 if device.type == "cpu" else 1 << 22


def recompute(function: Callable[..., Tensor], x: Tensor, *args: object, instead_of: int) -> Tensor:
    """``function(x, *args)``, whose intermediate results the backward pass computes again instead of keeping them.

    Only what leads up to the last thing that the backward pass needs is computed twice: a matrix product at the end of
    ``function`` runs once. ``function`` must draw no random numbers. Under torch.compile it does nothing: that
    decides for itself what to recompute.

    Args:
        function: computes a tensor.
        x, args: what it takes.
        instead_of: how many numbers would be kept; below :func:`small` they are.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or instead_of < small(x.device):
        return function(x, *args)
    return checkpoint(function, x, *args, use_reentrant=False, preserve_rng_state=False)
