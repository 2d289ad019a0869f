"""Checkpoints: written whole, checked, read without running code, fitted to models."""

from . import hook  # noqa: F401
from .reading import allow_mmengine_objects
from .safe_loading import make_mmengine_load_safely

allow_mmengine_objects()
make_mmengine_load_safely()
