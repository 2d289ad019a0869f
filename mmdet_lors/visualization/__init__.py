"""Pictures of predictions, and how they are named."""

from .drawing import DetectionVisualizer
from .hook import PicturesHook

__all__ = ["DetectionVisualizer", "PicturesHook"]
