"""PELA: low-rank compression of a pre-trained model, and its recovery by distillation."""

from .choice import OMIT
from .compressed import build_compressed, build_compressed_backbone
from .compression import CompressedLayer, compress, decompress
from .distiller import PELADistiller
from .losses import FeatureDistillationLoss, WeightPerturbationLoss
from .low_rank import LowRankLinear
from .vit_maps import ViTMaps
from .vit_pyramid import ViTPyramid

__all__ = [
    "OMIT",
    "CompressedLayer",
    "FeatureDistillationLoss",
    "LowRankLinear",
    "PELADistiller",
    "ViTMaps",
    "ViTPyramid",
    "WeightPerturbationLoss",
    "build_compressed",
    "build_compressed_backbone",
    "compress",
    "decompress",
]
