"""AdaMixer with LORS for MMDetection 3.x. Importing this package registers its parts with mmdet."""

from . import adamixer
from .engine import hooks
from .engine.checkpoint import allow_mmengine_objects

__version__ = "0.1.0"

__all__ = ["adamixer", "hooks"]

allow_mmengine_objects()
