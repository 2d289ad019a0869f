# Shared weights alone: the layers differ by biases and norms, a recurrent encoder.
_base_ = "../deit-tiny-lors_cifar100.py"

model = dict(
    stacks=[
        dict(
            layers="network.blocks",
            targets=["attn.*", "mlp.*"],
            rank=32,
            groups={"attn.*": 0, "mlp.*": 0},
        )
    ]
)
