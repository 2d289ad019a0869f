# Only shared weights, a recurrent encoder: the layers differ only in biases and norms.
_base_ = "../deit-tiny-lors_cifar100.py"

model = dict(
    stacks=[
        dict(
            layers="network.blocks",
            targets=["attn.*", "mlp.*"],
            rank=32,
            init="paper",
            groups={"attn.*": 0, "mlp.*": 0},
        )
    ]
)
