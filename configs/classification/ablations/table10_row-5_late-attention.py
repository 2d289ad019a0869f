# Cells of the paper are missing in our copy; our choice: one group, but more for late self-attention.
_base_ = "../deit-tiny-lors_cifar100.py"

model = dict(
    stacks=[
        dict(
            layers="network.blocks",
            targets=["attn.*", "mlp.*"],
            rank=32,
            init="paper",
            groups={"attn.*": [1] * 9 + [2, 4, 6], "mlp.*": 1},
        )
    ]
)
