"""Data that does not fit a config is refused before anything runs, and by name."""

import json
import shutil

import pytest
from conftest import LORS_DIGITS, ROOT, load_config
from mmengine.config import Config

from mmdet_lors.engine.checks import check_inputs
from mmdet_lors.errors import UserError

SPLITS = ("train", "val", "test")


def config_for(data) -> Config:
    cfg = load_config(LORS_DIGITS)
    for split in SPLITS:
        cfg[f"{split}_dataloader"].dataset.data_root = str(data)
        if split != "train":
            cfg[f"{split}_evaluator"].ann_file = str(data / "annotations/val.json")
    return cfg


@pytest.fixture
def data(tiny_digits, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_digits, tmp_path / "digits")


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_good_data_passes(data):
    check_inputs(config_for(data), SPLITS)


def test_coco_config_without_coco_says_how_to_get_it():
    cfg = load_config("configs/adamixer/adamixer_r50_100-queries_1x_coco.py")
    cfg.train_dataloader.dataset.data_root = "nowhere/coco/"
    with pytest.raises(UserError, match=r"data folder nowhere/coco does not exist; get train2017.zip"):
        check_inputs(cfg, SPLITS)


def test_digits_config_without_digits_says_how_to_make_them(tmp_path):
    with pytest.raises(UserError, match="does not exist; make it with: python tools/dataset_converters"):
        check_inputs(config_for(tmp_path / "digits"), SPLITS)


def test_missing_annotations(data):
    (data / "annotations/val.json").unlink()
    with pytest.raises(UserError, match=r"annotation file .*val.json does not exist"):
        check_inputs(config_for(data), SPLITS)


@pytest.mark.parametrize("content", ["", "no json {", "\x00\x01", "[1, 2", '{"images": []'])
def test_annotations_that_are_no_json(data, content):
    (data / "annotations/train.json").write_text(content)
    with pytest.raises(UserError, match=r"annotation file .*train.json is no JSON"):
        check_inputs(config_for(data), SPLITS)


@pytest.mark.parametrize("content", ["{}", "[]", '"text"', '{"images": []}'])
def test_json_that_is_no_coco(data, content):
    (data / "annotations/train.json").write_text(content)
    with pytest.raises(UserError, match=r"train.json is no COCO data set: it has no .*categories"):
        check_inputs(config_for(data), SPLITS)


def test_other_categories(data):
    edit(data / "annotations/train.json", lambda c: [k.update(name="cat" + k["name"]) for k in c["categories"]])
    with pytest.raises(UserError, match="has no category '0', '1', '2' and 7 more of the config's 10 classes; it has"):
        check_inputs(config_for(data), SPLITS)


def test_num_classes_that_does_not_match(data):
    cfg = config_for(data)
    cfg.model.decoder.num_classes = 80
    message = "model.decoder.num_classes is 80, but train_dataloader's data set has 10 classes"
    with pytest.raises(UserError, match=message):
        check_inputs(cfg, SPLITS)


def test_missing_image_folder(data):
    shutil.rmtree(data / "val")
    with pytest.raises(UserError, match=r"val_dataloader: image folder .*val does not exist"):
        check_inputs(config_for(data), SPLITS)


def test_image_folder_of_another_data_set(data):
    shutil.rmtree(data / "train")
    (data / "train").mkdir()
    with pytest.raises(UserError, match=r"train_dataloader: image .*train/000001.png, the first of"):
        check_inputs(config_for(data), SPLITS)


def test_wrapped_data_sets_are_checked(data):
    cfg = config_for(data)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[inner])
    )
    check_inputs(cfg, SPLITS)
    shutil.rmtree(data / "train")
    with pytest.raises(UserError, match="image folder"):
        check_inputs(cfg, SPLITS)


def test_a_teacher_without_its_weights_is_refused(tmp_path):
    cfg = Config.fromfile(ROOT / "configs/pela/pela-distiller_vit_digits.py")
    missing = cfg.model.teacher_checkpoint = str(tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=f"model.teacher_checkpoint: file {missing} does not exist"):
        check_inputs(cfg, ("train", "val"))
    # For prediction a distiller is its student.
    check_inputs(cfg, ("test",))
    (tmp_path / "teacher.pth").touch()
    check_inputs(cfg, ("train", "val"))
    cfg.model.teacher_checkpoint = "timm://vit_tiny_patch16_224"
    check_inputs(cfg, ("train", "val"))
