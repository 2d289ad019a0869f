"""Mixed precision without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """mmengine's ``AmpOptimWrapper`` is for accelerators; on a CPU bfloat16 needs no loss scaling, only autocast."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The forward pass in bfloat16 where that is safe."""
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield
