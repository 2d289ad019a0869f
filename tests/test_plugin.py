"""The package as a plugin: a config of somebody else's folder that imports it, and nothing but mmdet around it."""

import subprocess
import sys

CONFIG = """
_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["mmdet_lors"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="QueryBased",
    data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
    backbone=dict(type="ResNet", depth=18, out_indices=(0, 1, 2, 3)),
    neck=dict(type="FPN", in_channels=[64, 128, 256, 512], out_channels=32, num_outs=4),
    query_generator=dict(type="InitialQueryGenerator", num_queries=10, content_dim=32),
    decoder=dict(
        type="AdaMixerDecoder",
        num_stages=2,
        num_classes=3,
        featmap_strides=[4, 8, 16, 32],
        stage=dict(
            type="AdaMixerDecoderStage", content_dim=32, feat_channels=32, num_groups=2, in_points=4, out_points=8
        ),
        lors=dict(adaptive=dict(rank=2), static=dict(rank=2)),
        loss_cls=dict(type="FocalLoss"),
        loss_bbox=dict(type="L1Loss"),
        loss_iou=dict(type="GIoULoss"),
    ),
    train_cfg=dict(assigner=dict(type="HungarianAssigner", match_costs=[dict(type="FocalLossCost")])),
    test_cfg=dict(max_per_img=10),
)
"""
USE = """
import sys, numpy as np
from mmdet.apis import inference_detector, init_detector

model = init_detector(sys.argv[1], device="cpu")
result = inference_detector(model, np.zeros((64, 96, 3), np.uint8), test_pipeline=None)
print("detections:", len(result.pred_instances), tuple(result.pred_instances.bboxes.shape))
"""


def test_a_foreign_config_builds_and_predicts_through_mmdets_own_api(tmp_path):
    config = tmp_path / "theirs.py"
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(96, 64), keep_ratio=True),
        dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
    ]
    data = dict(dataset=dict(type="CocoDataset", pipeline=pipeline, metainfo=dict(classes=("a", "b", "c"))))
    config.write_text(CONFIG + f"test_dataloader = {data!r}\n")
    command = [sys.executable, "-W", "ignore", "-c", USE, str(config)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "detections: 10 (10, 4)" in done.stdout
