"""Numbers of the host on a device, without waiting for the device."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def to_device(values: Sequence | np.ndarray, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Values as a tensor on the device of ``like``.

    ``torch.tensor(values, device="cuda")`` and ``new_tensor`` copy from memory that is not pinned, and wait until the
    GPU has done all that was asked of it before.

    Args:
        values: numbers, as for ``torch.tensor``.
        like: on that device.
        dtype: the result's; that of ``like`` by default.
    """
    pinned = like.is_cuda and not torch.compiler.is_compiling()  # a graph that is compiled or exported has constants
    made = torch.tensor(values, dtype=dtype or like.dtype)
    return (made.pin_memory() if pinned else made).to(like.device, non_blocking=pinned)


class ConstantsDoNotWait(TorchFunctionMode):
    """Inside, ``new_tensor``, by which mmdet's losses and match costs make their constants, is :func:`to_device`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.new_tensor and len(args) == 2 and not kwargs:
            return to_device(args[1], args[0])
        return func(*args, **(kwargs or {}))


def constants_do_not_wait(like: Tensor) -> AbstractContextManager:
    """:class:`ConstantsDoNotWait`, but nothing on a CPU, where looking at every call takes time for nothing."""
    return nullcontext() if like.is_cpu else ConstantsDoNotWait()
