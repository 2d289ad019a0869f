"""Small tensors from the host, which a GPU does not wait for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values as a tensor on the device; CUDA copies them from page-locked memory, without waiting."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
