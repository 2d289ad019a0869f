"""Mixed precision without a CUDA GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """bfloat16 on devices that mmengine's ``AmpOptimWrapper`` refuses, such as a CPU or mps, without loss scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass in bfloat16 where that is safe."""
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield
