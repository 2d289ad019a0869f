# Cells of the paper are missing in our copy; our choice: private weights only in the FFNs.
_base_ = "../deit-tiny-lors_cifar100.py"

model = dict(
    stacks=[
        dict(
            layers="network.blocks",
            targets=["attn.*", "mlp.*"],
            rank=32,
            init="paper",
            groups={"attn.*": 0, "mlp.*": 1},
        )
    ]
)
