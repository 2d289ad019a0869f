"""Trading memory for arithmetic where arithmetic is the cheaper of the two."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SMALL = 1 << 22
"""Fewer numbers, 16 MB in float32, are kept: computing them again would take longer to prepare than to do."""


def recompute(function: Callable[..., Tensor], *args: object, instead_of: int) -> Tensor:
    """``function(*args)``, whose intermediate results the backward pass computes again instead of keeping them.

    Only what leads up to the last thing that the backward pass needs is computed twice: a matrix product at the end of
    ``function`` runs once. ``function`` must draw no random numbers. Under torch.compile it does nothing: that
    decides for itself what to recompute.

    Args:
        function: computes a tensor.
        args: what it takes.
        instead_of: how many numbers would be kept; below :data:`SMALL` they are.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or instead_of < SMALL:
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
