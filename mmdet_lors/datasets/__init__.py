"""Data sets that refuse or skip bad data, and say so: annotation files, images, boxes; and their evaluation."""

from .coco import CheckedCocoDataset
from .evaluation import EvaluatedDataHook
from .metric import CheckedCocoMetric

__all__ = ["CheckedCocoDataset", "CheckedCocoMetric", "EvaluatedDataHook"]
