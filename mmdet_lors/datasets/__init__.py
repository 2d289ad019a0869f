"""Data sets that refuse or skip bad annotation files, images and boxes, and report it; and their evaluation."""

from .coco import CheckedCocoDataset
from .evaluation import EvaluatedDataHook
from .metric import CheckedCocoMetric

__all__ = ["CheckedCocoDataset", "CheckedCocoMetric", "EvaluatedDataHook"]
