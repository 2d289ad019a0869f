"""AdaMixer with LORS for MMDetection 3.x. Importing this package registers its parts with mmdet."""

from . import adamixer, pela
from .engine import amp, hooks, with_lors
from .engine.checkpoint import allow_mmengine_objects

__version__ = "0.1.0"

__all__ = ["adamixer", "amp", "hooks", "pela", "with_lors"]

allow_mmengine_objects()
