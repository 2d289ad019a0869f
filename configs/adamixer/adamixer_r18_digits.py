# A small AdaMixer that learns the embedded digits from scratch: half-width ResNet-18 up to stride 16, 3 decoder stages,
# 20 queries.
_base_ = [
    "../_base_/models/adamixer_r50.py",
    "../_base_/datasets/digits.py",
    "../_base_/schedules/adamixer_digits.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128], out_channels=64),
    query_generator=dict(num_queries=20, content_dim=64),
    decoder=dict(
        num_stages=3,
        num_classes=10,
        featmap_strides=[4, 8, 16],
        stage=dict(
            content_dim=64,
            feat_channels=64,
            num_heads=4,
            ffn_channels=256,
            num_groups=2,
            in_points=16,
            out_points=32,
        ),
    ),
    test_cfg=dict(max_per_img=20),
)
randomness = dict(seed=0)
