"""Data sets: sizes, splits and images; missing and damaged files are refused in one line that says how to mend it."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmdet.registry import DATASETS
from mmengine.config import Config
from PIL import Image
from torchvision import datasets

import mmdet_lors.classification  # noqa: F401
from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.errors import UserError

PLAIN = dict(input_size=8, crop_pct=1.0)
DIGITS, CIFAR = "configs/classification/vit_digits.py", "configs/classification/deit-tiny_cifar100.py"


def build(type: str, **fields):
    return DATASETS.build(dict(type=type, transform=PLAIN, **fields))


def test_digits_are_split_class_by_class():
    train, val = (build("SklearnDigits", split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1442, 355)
    labels = [np.bincount([label for _, label in data.source], minlength=10) for data in (train, val)]
    assert all(abs(counts[1] / sum(counts) - 0.2) < 0.01 for counts in np.transpose(labels))
    pixels = [{image.tobytes() for image, _ in data.source} for data in (train, val)]
    assert not pixels[0] & pixels[1]
    assert train.metainfo["classes"] == tuple("0123456789")


def test_an_item_is_a_uint8_image_and_its_label():
    data = build("SklearnDigits", split="val")
    item = data[0]
    assert item["inputs"].shape == (1, 8, 8) and item["inputs"].dtype == torch.uint8
    assert item["inputs"].max() == 255 and item["data_samples"] == data.source[0][1]
    resized = DATASETS.build(dict(type="SklearnDigits", split="val", transform=dict(input_size=32, crop_pct=1.0)))
    assert resized[0]["inputs"].shape == (1, 32, 32)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A data set in CIFAR-100's files, 8 images to train and 4 to validate; torchvision is given their check sums."""
    folder = tmp_path / "cifar100" / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name, n in (("train", 8), ("test", 4)):
        content = dict(data=rng.integers(0, 255, (n, 3072), np.uint8), fine_labels=list(range(n)))
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps(dict(fine_label_names=[f"class {i}" for i in range(100)])))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", dict(datasets.CIFAR100.meta, md5=sums["meta"]))
    return folder


def cifar_config(root) -> Config:
    cfg = Config.fromfile(ROOT / CIFAR)
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = str(root)
    return cfg


def test_cifar100(cifar):
    cfg = cifar_config(cifar.parent)
    check_inputs(cfg, ("train", "val", "test"))
    train, val = (DATASETS.build(cfg[f"{split}_dataloader"].dataset) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 4) and len(train.metainfo["classes"]) == 100
    assert train[0]["inputs"].shape == (3, 56, 56) and val[3]["data_samples"] == 3


def test_training_images_of_cifar100_are_whole_and_flipped_at_random(cifar):
    cfg = cifar_config(cifar.parent)
    train = DATASETS.build(cfg.train_dataloader.dataset)
    seen = torch.stack([train[0]["inputs"] for _ in range(16)]).unique(dim=0)
    cfg.val_dataloader.dataset.split = "train"
    whole = DATASETS.build(cfg.val_dataloader.dataset)[0]["inputs"]
    assert len(seen) == 2 and any(torch.equal(image, whole) for image in seen)


def test_missing_cifar100_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError) as error:
        check_inputs(cifar_config(tmp_path / "none"), ("train",))
    message = str(error.value)
    assert (
        message.startswith("train_dataloader: data folder ")
        and "does not exist; get cifar-100-python.tar.gz" in message
    )
    assert "\n" not in message


def test_damaged_cifar100(cifar):
    (cifar / "train").write_bytes((cifar / "train").read_bytes()[:100])
    with pytest.raises(UserError, match="is incomplete or damaged; get cifar-100-python.tar.gz"):
        check_inputs(cifar_config(cifar.parent), ("train",))


@pytest.fixture
def folders(tmp_path):
    """Two classes of two pictures each, to train and to validate."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (20, 16), (10 * i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def folder_config(root) -> Config:
    cfg = Config.fromfile(ROOT / "configs/_base_/datasets/imagenet.py")
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = str(root)
    cfg.model = dict(num_classes=2)
    return cfg


def test_folders_of_pictures(folders):
    cfg = folder_config(folders)
    check_inputs(cfg, ("train", "val", "test"))
    train = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(train) == 4 and train.metainfo["classes"] == ("cat", "dog")
    assert train[3]["inputs"].shape == (3, 224, 224) and train[3]["data_samples"] == 1


def test_folders_that_do_not_fit(folders):
    cfg = folder_config(folders)
    cfg.model.num_classes = 1000
    with pytest.raises(UserError, match="model.num_classes is 1000, but train_dataloader's data set has 2 classes"):
        check_inputs(cfg, ("train",))
    cfg.model.num_classes = 2
    (folders / "val" / "dog").rename(folders / "val" / "fish")
    with pytest.raises(UserError, match="val_dataloader's 2 classes are not train_dataloader's 2, which lack 'fish'"):
        check_inputs(cfg, ("train", "val"))
    with pytest.raises(UserError, match="train_dataloader: data folder .*nowhere/train does not exist; it must have"):
        check_inputs(folder_config("nowhere"), ("train",))


def test_a_class_without_pictures(folders):
    (folders / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        build("ImageFolder", data_root=str(folders), split="train")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("split", "test", "train_dataloader: split must be 'train' or 'val', got 'test'"),
        ("transform", dict(size=3), "SklearnDigits.transform: .*unexpected keyword argument 'size'"),
        ("transform", dict(input_size=32, re_prob=0.25), "transform.re_prob has no effect: set model.random_erasing"),
        ("transform", dict(input_size=32, std=(1.0,)), "transform.std has no effect: set model.data_preprocessor"),
        ("root", "x", "SklearnDigits: got an unexpected keyword argument 'root'"),
    ],
)
def test_refuses_a_field(field, value, message):
    cfg = Config.fromfile(ROOT / DIGITS)
    cfg.train_dataloader.dataset[field] = value
    if field == "transform":
        cfg.train_dataloader.dataset.transform = Config(value)._cfg_dict
    with pytest.raises(UserError, match=message):
        check_inputs(cfg, ("train",))
