# A small DINO that learns the embedded digits from scratch: half-width ResNet-18, 3 decoder layers, 20 queries. The
# width stays 256, which mmdet's DINO assumes; without the level of stride 4 it is still quick.
_base_ = [
    "../../_base_/models/dino_r50.py",
    "../../_base_/datasets/digits.py",
    "../../_base_/schedules/adamixer_digits.py",
    "../../_base_/default_runtime.py",
]

model = dict(
    num_queries=20,
    num_feature_levels=3,
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=18,
        base_channels=32,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
        norm_eval=False,
    ),
    neck=dict(in_channels=[64, 128], num_outs=3),
    encoder=dict(
        num_layers=1,
        layer_cfg=dict(self_attn_cfg=dict(num_levels=3), ffn_cfg=dict(feedforward_channels=512)),
    ),
    decoder=dict(
        num_layers=3,
        layer_cfg=dict(cross_attn_cfg=dict(num_levels=3), ffn_cfg=dict(feedforward_channels=512)),
    ),
    bbox_head=dict(num_classes=10),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=20),
)
train_cfg = dict(max_epochs=6, val_interval=6)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=6, T_max=6, convert_to_iter_based=True),
]
randomness = dict(seed=0)
