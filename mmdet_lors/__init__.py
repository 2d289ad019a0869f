"""AdaMixer with LORS for MMDetection 3.x. Importing this package registers its parts with mmdet."""

from .compatibility import check_versions

check_versions()  # Before anything imports mmdet.

from . import adamixer, datasets, pela, registry, valid_json  # noqa: E402
from .engine import amp, drawing, hooks, loops, non_finite, reliable_checkpoint, with_lors, zero  # noqa: E402
from .engine.checkpoint import allow_mmengine_objects  # noqa: E402
from .engine.safe_loading import make_mmengine_load_safely  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "adamixer",
    "amp",
    "datasets",
    "drawing",
    "hooks",
    "loops",
    "non_finite",
    "pela",
    "registry",
    "reliable_checkpoint",
    "valid_json",
    "with_lors",
    "zero",
]

allow_mmengine_objects()
make_mmengine_load_safely()
