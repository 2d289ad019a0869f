# Only the model of mmdet's DINO with four scales: data and schedule come from other bases, and no two bases may have
# fields in common. With an import before it, `_base_` would be read as that of a new-style config.
_base_ = []

from mmengine.hub import get_config  # noqa: E402

model = get_config("mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py").model
