"""PELA: low-rank compression of a pre-trained model, which needs torch alone, and its recovery by distillation."""

from mmdet_lors.compatibility import has_mmdet

from .budget import Allocation, allocate
from .calibration import Moment, second_moments
from .choice import OMIT
from .compression import CompressedLayer, compress, decompress
from .low_rank import LowRankConv2d, LowRankLinear

__all__ = [
    "OMIT",
    "Allocation",
    "CompressedLayer",
    "LowRankConv2d",
    "LowRankLinear",
    "Moment",
    "allocate",
    "compress",
    "decompress",
    "second_moments",
]

if has_mmdet():
    from .compressed import build_compressed, build_compressed_backbone
    from .distiller import PELADistiller
    from .losses import FeatureDistillationLoss, WeightPerturbationLoss
    from .vit_maps import ViTMaps
    from .vit_pyramid import ViTPyramid

    __all__ += [
        "FeatureDistillationLoss",
        "PELADistiller",
        "ViTMaps",
        "ViTPyramid",
        "WeightPerturbationLoss",
        "build_compressed",
        "build_compressed_backbone",
    ]
