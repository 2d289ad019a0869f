_base_ = "../adamixer/adamixer_swin-s_300-queries_crop-ms-480-800-3x_coco.py"

model = dict(
    decoder=dict(
        stage=dict(num_groups=2, in_points=64),
        lors=dict(
            adaptive=dict(rank=16, groups=[1, 1, 2, 2, 3, 3]),
            static=dict(rank=8, groups=1),
        ),
    )
)
