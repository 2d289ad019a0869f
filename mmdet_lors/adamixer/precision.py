"""What stays in full precision when the rest of the decoder runs in half."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn


def full_precision(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) outside autocast, in the data type of the module's parameters."""
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return module(x.to(next(module.parameters()).dtype))
