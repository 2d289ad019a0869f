"""Low-rank residual structure (LORS) as plain PyTorch modules. Nothing in this folder needs more than torch."""

from .adaptive import LORSA, AdaptiveWeights
from .static import LORST

__all__ = ["LORSA", "LORST", "AdaptiveWeights"]
