# The Swin-B that the PELA paper's Table 3 counts: half of every Linear, attention's projections too. A student for it
# is trained by pela-distiller_swin-base_imagenet.py with these two fields; its omit also has "head".
_base_ = "cascade-mask-rcnn_pela-swin-base_crop-ms-480-800-3x_coco.py"

model = dict(backbone=dict(ratio=2, omit=["norm", "patch_embed", "downsample"]))
