"""Classification data sets: scikit-learn's digits, which come with it, CIFAR-100, and ImageNet-style folders."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import DATASETS
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from mmdet_lors.datasets.unusable import MAX_UNUSABLE_SHARE, UnusableImages, check_share, reason_of
from mmdet_lors.errors import UserError, first_line

CIFAR100_HINT = (
    "get cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there, or run: python "
    "-c \"from torchvision.datasets import CIFAR100; CIFAR100('{root}', download=True)\""
)


MAX_REPLACED = 1000
"""How many images in a row training may replace."""
WITHOUT_EFFECT = dict(
    {field: "model.random_erasing" for field in ("re_prob", "re_mode", "re_count", "re_num_splits")},
    **{field: "model.data_preprocessor" for field in ("normalize", "std")},
)
"""Fields of timm's transforms that our classifier's own fields stand for."""


class ClassificationDataset(Dataset):
    """Images with one label each, turned into tensors by timm's transforms.

    In training, an image that cannot be read is replaced by another, random one, and logged once; in validation it is
    an error.

    Args:
        source: (PIL image, label) of every image.
        classes: their names, in the order of the labels.
        transform: fields of ``timm.data.create_transform``, except for normalisation and erasing, which follow it: they
            are the classifier's. ``is_training`` says what the data set is for.
        max_unusable_share: largest share of all images, 0 to 1, that each process may find unusable.

    Raises:
        UserError: a field of ``transform`` that is unknown or without effect, or a share outside [0, 1]; when an image
            is loaded: images that cannot be read, see above.
    """

    def __init__(
        self,
        source: Sequence,
        classes: Sequence[str],
        transform: dict,
        max_unusable_share: float = MAX_UNUSABLE_SHARE,
    ) -> None:
        check_share(max_unusable_share)
        self.source = source
        self.training = bool(transform.get("is_training"))
        self.unusable = UnusableImages(len(source), max_unusable_share)
        self.metainfo = dict(classes=tuple(classes))
        for field, place in WITHOUT_EFFECT.items():
            if field in transform:
                raise UserError(f"{type(self).__name__}.transform.{field} has no effect: set {place}")
        try:
            # For timm's prefetcher a transform ends with the image in uint8; our preprocessor does the rest instead.
            self.transform = create_transform(**transform, use_prefetcher=True)
        except (TypeError, AssertionError, KeyError) as error:
            raise UserError(f"{type(self).__name__}.transform: {error}") from error

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        """``inputs``, an image of (C, H, W) uint8, and ``data_samples``, its label."""
        for _ in range(MAX_REPLACED):
            try:
                image, label = self.source[index]
                return dict(inputs=self.transform(image), data_samples=int(label))
            except MemoryError:
                raise
            except Exception as error:
                if not self.training:
                    raise UserError(f"image {self.image_name(index)} cannot be used: {reason_of(error)}") from error
                self.unusable.add(index, self.image_name(index), error)
                index = int(torch.randint(len(self), ()))
        raise UserError(f"{MAX_REPLACED} images in a row could not be used; the log names them")

    def image_name(self, index: int) -> str:
        """The file of an image, or its place in the data set."""
        files = getattr(self.source, "samples", None)
        return f"at place {index}" if files is None else files[index][0]

    @classmethod
    def check(cls, **fields) -> tuple[str, ...]:
        """Check these fields of a data set and return its classes, without reading images if that would take long.

        Raises:
            UserError: what is missing or unknown, and how to fix it.
        """
        cls._check_fields(fields)
        return cls(**fields).metainfo["classes"]

    @classmethod
    def _check_fields(cls, fields: dict) -> None:
        try:
            inspect.signature(cls).bind(**fields)
        except TypeError as error:
            raise UserError(f"{cls.__name__}: {error}") from error


def _check_split(split: str) -> None:
    if split not in ("train", "val"):
        raise UserError(f"split must be 'train' or 'val', got {split!r}")


@DATASETS.register_module()
class SklearnDigits(ClassificationDataset):
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: 1,442 for training, 355 for validation.

    Every fifth image of a class is for validation. Images are grey: one channel.

    Args:
        split: 'train' or 'val'.
        transform: see :class:`ClassificationDataset`.
    """

    def __init__(self, split: str, transform: dict) -> None:
        _check_split(split)
        # Imported here because it takes a second, which only this data set should cost.
        from sklearn.datasets import load_digits

        digits = load_digits()
        validates = np.zeros(len(digits.target), bool)
        for label in range(10):
            validates[np.flatnonzero(digits.target == label)[4::5]] = True
        rows = np.flatnonzero(validates == (split == "val"))
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        source = [(Image.fromarray(pixels[row]), int(digits.target[row])) for row in rows]
        super().__init__(source, [str(label) for label in range(10)], transform)


@DATASETS.register_module()
class CIFAR100(ClassificationDataset):
    """CIFAR-100: 50,000 images of 32 x 32 pixels for training, 10,000 for validation.

    Args:
        data_root: the folder that contains ``cifar-100-python/``.
        split: 'train' or 'val'.
        transform: see :class:`ClassificationDataset`.

    Raises:
        UserError: files are missing or damaged.
    """

    def __init__(self, data_root: str, split: str, transform: dict) -> None:
        _check_split(split)
        hint = CIFAR100_HINT.format(root=data_root)
        folder = Path(data_root) / datasets.CIFAR100.base_folder
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist; {hint}")
        try:
            source = datasets.CIFAR100(data_root, train=split == "train")
        except RuntimeError as error:
            raise UserError(f"data folder {folder} is incomplete or damaged; {hint}") from error
        super().__init__(source, source.classes, transform)


@DATASETS.register_module()
class ImageFolder(ClassificationDataset):
    """Pictures in one folder per class, as ImageNet is unpacked: ``train/n01440764/n01440764_18.JPEG``.

    Args:
        data_root: the folder that contains ``train/`` and ``val/``.
        split: name of one of these folders.
        transform, max_unusable_share: see :class:`ClassificationDataset`.

    Raises:
        UserError: a folder that does not exist, or a class without a picture.
    """

    def __init__(
        self, data_root: str, split: str, transform: dict, max_unusable_share: float = MAX_UNUSABLE_SHARE
    ) -> None:
        classes = self._classes(data_root, split)
        try:
            source = datasets.ImageFolder(str(Path(data_root) / split))
        except FileNotFoundError as error:
            raise UserError(first_line(error)) from error
        super().__init__(source, classes, transform, max_unusable_share)

    @classmethod
    def check(cls, **fields) -> tuple[str, ...]:
        """The classes, from the names of the folders only; see :meth:`ClassificationDataset.check`."""
        cls._check_fields(fields)
        ClassificationDataset([], [], fields["transform"], fields.get("max_unusable_share", MAX_UNUSABLE_SHARE))
        return cls._classes(fields["data_root"], fields["split"])

    @staticmethod
    def _classes(data_root: str, split: str) -> tuple[str, ...]:
        folder = Path(data_root) / split
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist; it must have one folder of pictures per class")
        classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        if not classes:
            raise UserError(f"data folder {folder} must have one folder of pictures per class; it has no folder")
        return classes
