"""ZeRO stage 1: every process keeps the optimizer state of its share of the weights."""

from typing import Any

from mmengine.dist import is_distributed, is_main_process
from mmengine.optim import ZeroRedundancyOptimizer
from mmengine.registry import OPTIMIZERS
from torch.distributed.optim import ZeroRedundancyOptimizer as TorchZeroRedundancyOptimizer

from mmdet_lors.errors import UserError


@OPTIMIZERS.register_module()
class ZeroOptimizer(ZeroRedundancyOptimizer):
    """mmengine's ``ZeroRedundancyOptimizer``, whose checkpoints can be saved: Rajbhandari et al., arXiv:1910.02054.

    mmengine's collects the state of all processes while a checkpoint is written, which only the first process does, so
    that it waits for the others for ever. Here all processes call :func:`collect_state` before. The collected state is
    that of the plain optimizer, and each of the two loads the other's.

    Args:
        params: weights or groups of them.
        optimizer_type: a class of ``torch.optim``, such as 'AdamW'.
        settings: its arguments.

    Raises:
        UserError: there is only one process, and nothing to share.
    """

    def __init__(self, params: Any, optimizer_type: str, **settings: Any) -> None:
        if not is_distributed():
            raise UserError(
                "optim_wrapper.optimizer.type 'ZeroOptimizer' shares its state between processes: start the run with "
                "tools/dist_train.sh"
            )
        super().__init__(params, optimizer_type, **settings)

    def state_dict(self) -> dict:
        """The state last collected, on the first process; empty on the others."""
        return TorchZeroRedundancyOptimizer.state_dict(self) if is_main_process() else {}


def collect_state(optimizer: Any) -> None:
    """Bring the shares of a sharded optimizer to the first process, for a checkpoint; called by all processes."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()
