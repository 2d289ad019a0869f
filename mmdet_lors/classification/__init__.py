"""Image classification with timm's models on mmengine's runner: data sets, classifier, accuracy, ImageNet weights."""

from .accuracy import Accuracy
from .classifier import TimmClassifier
from .datasets import CIFAR100, ImageFolder, SklearnDigits
from .pretrained import PretrainedParts
from .sampler import RepeatedAugmentation

__all__ = [
    "CIFAR100",
    "Accuracy",
    "ImageFolder",
    "PretrainedParts",
    "RepeatedAugmentation",
    "SklearnDigits",
    "TimmClassifier",
]
