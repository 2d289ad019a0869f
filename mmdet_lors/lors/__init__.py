"""Low-rank residual structure (LORS) as plain PyTorch modules. Nothing in this folder needs more than torch."""

from .adaptive import LORSA, AdaptiveWeights
from .budget import ranks_for_budget
from .stack import fold_stack, plain_stack, share_stack
from .static import LORST

__all__ = ["LORSA", "LORST", "AdaptiveWeights", "fold_stack", "plain_stack", "ranks_for_budget", "share_stack"]
