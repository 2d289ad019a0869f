_base_ = "../adamixer/adamixer_r50_100-queries_1x_coco.py"

model = dict(
    decoder=dict(
        stage=dict(num_groups=2, in_points=64),
        lors=dict(
            adaptive=dict(rank=16, groups=[1, 1, 2, 2, 3, 3]),
            static=dict(rank=8, groups=1),
        ),
    )
)
