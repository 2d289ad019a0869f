"""Numbers on their way between host and device, in either direction without waiting for the device."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    import numpy as np


def to_device(values: "Sequence | np.ndarray", like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
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


class ToHost:
    """A tensor on its way to the host. Who reads it when the device has since been waited for, waits for nothing.

    Args:
        tensor: on a device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.host = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        self.arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The tensor on the host; waits until the device has come to its copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host


class ConstantsDoNotWait(TorchFunctionMode):
    """Inside, numbers that mmdet and mmengine bring to the device go there by :func:`to_device`.

    They are the constants of losses and match costs, by ``new_tensor``, and the list by which channels are swapped.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.new_tensor and len(args) == 2 and not kwargs:
            return to_device(args[1], args[0])
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            x, index = args
            args = x, tuple(to_device(i, x, torch.long) if _places(i) else i for i in index)
        return func(*args, **(kwargs or {}))


def _places(index: object) -> bool:
    return isinstance(index, list) and all(type(i) is int for i in index)


def constants_do_not_wait(device: torch.device) -> AbstractContextManager:
    """:class:`ConstantsDoNotWait`, but nothing on a CPU, where looking at every call takes time for nothing."""
    return nullcontext() if device.type == "cpu" else ConstantsDoNotWait()
