# The model alone of mmdet's DINO with four scales: data and schedule are others, and no two bases may have the same
# fields. With an import before it, `_base_` would be read as a new-style config's.
_base_ = []

from mmengine.hub import get_config  # noqa: E402

model = get_config("mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py").model
