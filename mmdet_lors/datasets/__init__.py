"""Data sets that refuse or skip bad data, and say so: annotation files, images, boxes."""

from .coco import CheckedCocoDataset

__all__ = ["CheckedCocoDataset"]
