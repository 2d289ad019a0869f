# Table 2 of the PELA paper, DeiT-III-L at half its size. The head is as wide as the backbone, with which the paper's
# count agrees; the rest is DeiT-B's.
_base_ = "upernet_pela-deit-base_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        backbone=dict(model_name="deit3_large_patch16_224", out_indices=[5, 11, 17, 23]),
        init_cfg=dict(checkpoint="timm://deit3_large_patch16_224"),
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
