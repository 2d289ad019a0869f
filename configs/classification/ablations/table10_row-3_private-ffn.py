# The paper's cells are lost; ours: private weights in the FFNs alone.
_base_ = "../deit-tiny-lors_cifar100.py"

model = dict(
    stacks=[
        dict(
            layers="network.blocks",
            targets=["attn.*", "mlp.*"],
            rank=32,
            groups={"attn.*": 0, "mlp.*": 1},
        )
    ]
)
