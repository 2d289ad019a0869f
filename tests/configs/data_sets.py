"""Data sets of a few images, each in the files of the real one."""

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from conftest import load_tool
from mmdet.datasets import CocoDataset
from PIL import Image
from torchvision import datasets

GENERATOR = np.random.default_rng(0)
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""Numbers below 91 that no category of COCO has."""
COCO_IDS = [i for i in range(1, 91) if i not in COCO_GAPS]


def _picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GENERATOR.integers(0, 255, (height, width, 3), np.uint8)).save(path)


def _object(image: int, category: int, box: Sequence[int]) -> dict:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x + w // 2, y + h + 3, x, y + h]
    return dict(image_id=image, category_id=category, bbox=box, area=w * h, iscrowd=0, segmentation=[polygon])


def _crowd(image: int, category: int, box: Sequence[int], size: tuple[int, int]) -> dict:
    x, y, w, h = box
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[y : y + h, x : x + w] = 1
    flat = pixels.ravel(order="F")
    # Run lengths, not compressed, as in COCO's own files; the first is of zeros.
    runs = np.diff([0, *np.flatnonzero(np.diff(flat)) + 1, len(flat)]).tolist()
    segmentation = dict(size=[size[1], size[0]], counts=runs)
    return dict(image_id=image, category_id=category, bbox=box, area=w * h, iscrowd=1, segmentation=segmentation)


def coco(root: Path) -> None:
    """COCO: 80 categories with its gaps, polygons, a crowd beside an object and one alone, images without objects."""
    # The last two train nobody: one has nothing on it, one is too small.
    sizes = [(140, 100), (140, 100), (100, 140), (140, 100), (140, 100), (30, 140)]
    for split, first, chosen in (("train", 100, range(6)), ("val", 500, (1, 4))):
        images, annotations = [], []
        for i, (width, height) in enumerate(sizes):
            if i not in chosen:
                continue
            name = f"{first + i:012}.jpg"
            _picture(root / f"{split}2017" / name, width, height)
            images.append(dict(id=first + i, file_name=name, width=width, height=height))
        rows = [(0, 0, (5, 5, 60, 50)), (0, 79, (70, 20, 40, 60)), (1, 40, (20, 30, 90, 50)), (2, 7, (10, 10, 50, 90))]
        for image, label, box in rows:
            annotations.append(_object(first + image, COCO_IDS[label], list(box)))
        for image, label in ((1, 40), (3, 0)):
            annotations.append(_crowd(first + image, COCO_IDS[label], [8, 8, 40, 30], sizes[image]))
        annotations = [row for row in annotations if row["image_id"] - first in chosen]
        annotations = [dict(row, id=i) for i, row in enumerate(annotations, start=1)]
        names = CocoDataset.METAINFO["classes"]
        categories = [dict(id=i, name=name) for i, name in zip(COCO_IDS, names, strict=True)]
        file = root / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def imagenet(root: Path) -> None:
    """ImageNet's 1,000 folders, one picture in each."""
    for split in ("train", "val"):
        for i in range(1000):
            _picture(root / split / f"n{i:08}" / f"n{i:08}_{i}.JPEG", 12, 10)


def cifar100(root: Path) -> None:
    """CIFAR-100's three files, 384 and 128 images."""
    folder = root / datasets.CIFAR100.base_folder
    folder.mkdir(parents=True)
    for name, n in (("train", 384), ("test", 128)):
        pixels = GENERATOR.integers(0, 255, (n, 3072), np.uint8)
        (folder / name).write_bytes(pickle.dumps(dict(data=pixels, fine_labels=[i % 100 for i in range(n)])))
    (folder / "meta").write_bytes(pickle.dumps(dict(fine_label_names=[f"class {i}" for i in range(100)])))


def know_cifar100(root: Path) -> None:
    """Give torchvision the check sums of these files for those of the real ones."""
    sums = {
        path.name: hashlib.md5(path.read_bytes()).hexdigest()
        for path in (root / datasets.CIFAR100.base_folder).iterdir()
    }
    datasets.CIFAR100.train_list = [["train", sums["train"]]]
    datasets.CIFAR100.test_list = [["test", sums["test"]]]
    datasets.CIFAR100.meta = dict(datasets.CIFAR100.meta, md5=sums["meta"])


def ade20k(root: Path) -> None:
    """ADE20K's folders, 4 and 2 images; 0 is no class."""
    for split, n in (("training", 4), ("validation", 2)):
        for i in range(n):
            name = f"ADE_{split[:5]}_{i:08}"
            _picture(root / "images" / split / f"{name}.jpg", 96, 80)
            labels = Image.fromarray(np.kron(GENERATOR.integers(0, 151, (5, 6), np.uint8), np.ones((16, 16), np.uint8)))
            path = root / "annotations" / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            labels.save(path)


def digits(root: Path) -> None:
    """The digits, 32 and 8 images."""
    load_tool("dataset_converters/digits_to_coco.py").build(root, train_images=32, val_images=8)


MAKERS = {
    "coco": coco,
    "imagenet": imagenet,
    "cifar100": cifar100,
    "ade/ADEChallengeData2016": ade20k,
    "digits": digits,
}
"""Folder below data/ -> what makes it."""


def make_all(root: Path) -> None:
    """All of them below ``root``/data, where the configs look for them when ``root`` is the current folder."""
    for name, make in MAKERS.items():
        make(root / "data" / name)
