_base_ = "adamixer_r50_100-queries_ms-480-800-3x_coco.py"

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint="torchvision://resnet101")))
