# The Swin-B that the PELA paper's Table 2 counts: half of every Linear, attention's projections too. A student for it
# is trained by pela-distiller_swin-base_imagenet.py with these two fields; its omit also has "head".
_base_ = "upernet_pela-swin-base_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(ratio=2, omit=["norm", "patch_embed", "downsample"]))
