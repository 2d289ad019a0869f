# The LORS paper's setting: 2 groups of 64 points; LORSA of rank 16 for M and S, LORST of rank 8 for their projection.
_base_ = "adamixer_r50.py"

model = dict(
    decoder=dict(
        stage=dict(num_groups=2, in_points=64),
        lors=dict(
            adaptive=dict(rank=16, groups=[1, 1, 2, 2, 3, 3]),
            static=dict(rank=8, groups=1),
        ),
    )
)
