"""Pictures of predictions, and their file names."""

from .drawing import DetectionVisualizer
from .hook import PicturesHook

__all__ = ["DetectionVisualizer", "PicturesHook"]
