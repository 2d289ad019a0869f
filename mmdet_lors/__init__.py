"""AdaMixer with LORS for MMDetection 3.x. Importing this package registers its parts with mmdet."""

from . import adamixer

__version__ = "0.1.0"

__all__ = ["adamixer"]
