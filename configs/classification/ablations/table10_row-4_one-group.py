# One group in every layer.
_base_ = "../deit-tiny-lors_cifar100.py"

model = dict(
    stacks=[
        dict(
            layers="network.blocks",
            targets=["attn.*", "mlp.*"],
            rank=32,
            init="paper",
            groups={"attn.*": 1, "mlp.*": 1},
        )
    ]
)
