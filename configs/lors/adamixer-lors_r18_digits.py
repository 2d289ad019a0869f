_base_ = "../adamixer/adamixer_r18_digits.py"

model = dict(
    decoder=dict(
        lors=dict(
            adaptive=dict(rank=8, groups=[1, 1, 2]),
            static=dict(rank=8, groups=1),
        ),
    )
)
