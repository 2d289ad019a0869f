"""Data that does not fit a config is refused before anything runs, and by name."""

import json
import shutil

import pytest
from conftest import LORS_DIGITS, ROOT, load_config
from mmengine.config import Config

from mmdet_lors.datasets.checks import check_inputs
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
    with pytest.raises(UserError, match=r"annotation file .*train.json is not JSON"):
        check_inputs(config_for(data), SPLITS)


@pytest.mark.parametrize("content", ["{}", "[]", '"text"', '{"images": []}'])
def test_json_that_is_no_coco(data, content):
    (data / "annotations/train.json").write_text(content)
    with pytest.raises(UserError, match=r"train.json is not a COCO data set: it has no .*categories"):
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


def copy_of(data, change=lambda content: None) -> str:
    """Another file of the validation data, with a change."""
    content = json.loads((data / "annotations/val.json").read_text())
    change(content)
    (data / "annotations/other.json").write_text(json.dumps(content))
    return str(data / "annotations/other.json")


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("several", [False, True])
def test_an_evaluator_of_other_data_is_refused_before_the_run(data, split, several):
    cfg = config_for(data)
    theirs = dict(cfg[f"{split}_evaluator"], ann_file=copy_of(data))
    cfg[f"{split}_evaluator"] = [cfg[f"{split}_evaluator"], theirs] if several else theirs
    check_inputs(cfg, SPLITS)  # another file of the same content
    copy_of(data, lambda content: content["images"].pop())
    with pytest.raises(
        UserError, match=f"{split}_evaluator evaluates against .*other.json, but {split}_dataloader loads .*val"
    ):
        check_inputs(cfg, SPLITS)


def test_an_evaluator_without_a_file_needs_ground_truth(data):
    cfg = config_for(data)
    cfg.val_evaluator.ann_file = None
    with pytest.raises(UserError, match="val_evaluator has no ann_file .* add 'instances' to the meta_keys"):
        check_inputs(cfg, SPLITS)
    cfg.val_dataloader.dataset.pipeline[-1].meta_keys += ("instances",)
    check_inputs(cfg, SPLITS)


def test_mmdets_own_metric_with_unsorted_categories(data):
    for split in ("train", "val"):
        edit(data / f"annotations/{split}.json", renumber)
    cfg = config_for(data)
    cfg.val_evaluator.classwise = True
    check_inputs(cfg, SPLITS)
    cfg.val_evaluator.type = "CocoMetric"
    with pytest.raises(UserError, match="val_evaluator: CocoMetric mixes up the classes' figures"):
        check_inputs(cfg, SPLITS)


def renumber(content: dict) -> None:
    for row in content["categories"]:
        row["id"] = 11 - row["id"]
    for row in content["annotations"]:
        row["category_id"] = 11 - row["category_id"]


def test_evaluated_data_are_checked_as_such_whatever_test_mode_says(data):
    cfg = config_for(data)
    cfg.test_dataloader.dataset.test_mode = False
    check_inputs(cfg, SPLITS)
    (data / "val/000003.png").unlink()
    with pytest.raises(UserError, match="dataloader: 1 of 8 images of .*val.json do not exist"):
        check_inputs(cfg, ("test",))
    edit(data / "annotations/val.json", lambda content: content["annotations"][0].update(id=0))
    with pytest.raises(UserError, match="has id 0; it must be a whole number from 1"):
        check_inputs(cfg, ("test",))


def test_classes_of_the_config(data, tmp_path):
    cfg = config_for(data)
    (tmp_path / "classes.txt").write_text("\n".join("0123456789"))
    for classes, message in (
        (str(tmp_path / "classes.txt"), None),
        ("0123456789", r"train_dataloader: classes '0123456789' is a single string .* with a comma"),
        (tuple("0123456788"), "train_dataloader: classes has '8' 2 times among its 10"),
    ):
        for split in SPLITS:
            cfg[f"{split}_dataloader"].dataset.metainfo = dict(classes=classes)
        if message is None:
            check_inputs(cfg, SPLITS)
        else:
            with pytest.raises(UserError, match=message):
                check_inputs(cfg, SPLITS)


def test_a_frame_that_the_pipeline_does_not_load(data):
    cfg = config_for(data)
    cfg.val_dataloader.dataset.exif = "stored"
    with pytest.raises(UserError, match="val_dataloader: exif='stored' is not how the pipeline loads pictures"):
        check_inputs(cfg, SPLITS)


@pytest.mark.parametrize(
    ("there", "named", "why"),
    [
        ("sub/a.png", "sub\\a.png", "but does exist with / in place of"),
        ("caf\u00e9.png", "cafe\u0301.png", "differs only in how Unicode composes letters"),
        ("cafe\u0301.png", "caf\u00e9.png", "differs only in how Unicode composes letters"),
        ("\u00fc/a.png", "u\u0308/a.png", "differs only in how Unicode composes letters"),
        ("A.PNG", "a.png", "differs only in upper and lower case"),
        ("b.png", "a.png", "; check the config's paths|; make it with"),
    ],
)
@pytest.mark.parametrize("row", [0, 3])
def test_names_of_images_that_are_almost_there(there, named, why, row, data):
    content = json.loads((data / "annotations/val.json").read_text())
    file = data / "val" / there
    file.parent.mkdir(exist_ok=True)
    (data / "val" / content["images"][row]["file_name"]).rename(file)
    edit(data / "annotations/val.json", lambda content: content["images"][row].update(file_name=named))
    with pytest.raises(UserError, match=f"do(es)? not exist.*{why}"):
        check_inputs(config_for(data), ("val",))


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
