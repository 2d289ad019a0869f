"""On a GPU with an mmcv that was built without CUDA, what needs its operators is refused before a run starts."""

import sys

import pytest
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, load_tool, write_random_lors

from mmdet_lors.commands import train
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.config_check import check_operators, operators
from mmdet_lors.engine.launch import load_config
from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer, inferencer

X101 = "configs/lors/adamixer-lors_x101-32x4d-dcn_300-queries_crop-ms-480-800-3x_coco.py"
DINO = "configs/lors/other_detectors/dino-lors_r18_digits.py"
DAB = "configs/lors/other_detectors/dab-detr-lors_r50_8xb2-50e_coco.py"
CASCADE = "configs/pela/cascade-mask-rcnn_pela-swin-base_crop-ms-480-800-3x_coco.py"
TTA = dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100))


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    monkeypatch.setattr(operators, "get_compiling_cuda_version", lambda: "not available")


def check(name: str, device: str = "cuda", training: bool = True, **outer) -> None:
    cfg = load_config(ROOT / name)
    check_operators(build_without_weights(cfg.model), dict(outer, module=cfg.model), device, training)


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS, "configs/classification/vit-lors_digits.py"])
def test_a_driver_is_enough_for_ours(name):
    check(name)


@pytest.mark.parametrize(
    ("name", "training", "part"),
    [
        (X101, False, r"model.backbone.layer2.0.conv2 \(DeformConv2dPack\)"),
        (DINO, False, r"model.encoder.layers.0.self_attn \(MultiScaleDeformableAttention\)"),
        (DAB, True, r"model.bbox_head.loss_cls \(FocalLoss\)"),
        (CASCADE, False, r"model.roi_head.bbox_roi_extractor.0.roi_layers.0 \(RoIAlign\)"),
    ],
)
def test_what_needs_an_operator_is_named_with_the_command(name, training, part):
    with pytest.raises(
        UserError, match=rf"^{part} on a GPU needs .*nvcc \d* ?, and run MMCV_CUDA=1 bash tools/"
    ) as error:
        check(name, training=training)
    assert "\n" not in str(error.value)


def test_focal_loss_is_not_called_in_a_test():
    check(DAB, training=False)


def test_test_time_augmentation_suppresses():
    with pytest.raises(UserError, match=r"^model.tta_cfg.nms on a GPU needs"):
        check(LORS_DIGITS, training=False, **TTA)
    soft = dict(TTA, tta_cfg=dict(nms=dict(type="soft_nms", iou_threshold=0.5)))
    check(LORS_DIGITS, training=False, **soft)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_are_not_refused(device):
    check(X101, device=device)


def test_an_mmcv_with_cuda_is_not_refused(monkeypatch):
    monkeypatch.setattr(operators, "get_compiling_cuda_version", lambda: "13.0")
    check(X101)


def test_train_refuses_before_anything_is_written(monkeypatch, tiny_digits, tmp_path):
    """A GPU is simulated: the device's name alone."""
    tool = load_tool("train.py")
    dcn = ["model.backbone.depth=50", "model.backbone.dcn.type=DCN", "model.backbone.stage_with_dcn=(False,True,True)"]
    root = f"train_dataloader.dataset.data_root={tiny_digits}"
    values = [root, root.replace("train", "val"), f"val_evaluator.ann_file={tiny_digits}/annotations/val.json"]
    options = ["--cfg-options", *dcn, "model.backbone.dcn.deform_groups=1", *values]
    monkeypatch.setattr(train, "get_device", lambda: "cuda")
    monkeypatch.setattr(sys, "argv", ["train.py", str(ROOT / LORS_DIGITS), "--work-dir", str(tmp_path / "w"), *options])
    with pytest.raises(UserError, match=r"model.backbone.layer2.0.conv2 \(DeformConv2dPack\) on a GPU needs"):
        tool.main()
    assert not (tmp_path / "w").exists()


def test_inference_refuses_too(monkeypatch, tmp_path):
    monkeypatch.setattr(inferencer, "usable", lambda device: device)
    with pytest.raises(UserError, match=r"DeformConv2dPack\) on a GPU needs"):
        Inferencer(ROOT / X101, write_random_lors(tmp_path), device="cuda")
