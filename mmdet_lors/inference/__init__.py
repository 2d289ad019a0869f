"""Inference: pictures, folders and videos in; boxes, pictures, JSON and COCO results out."""

from .inferencer import Inferencer

__all__ = ["Inferencer"]
