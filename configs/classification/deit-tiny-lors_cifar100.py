# The LORS paper's setting: LORST of rank 32 in all weights; more groups for late self-attention and for early FFNs.
_base_ = "deit-tiny_cifar100.py"

model = dict(
    _delete_=True,
    type="WithLORS",
    model=_base_.model,  # noqa: F821
    stacks=[
        dict(
            layers="network.blocks",
            targets=["attn.*", "mlp.*"],
            rank=32,
            init="paper",
            groups={"attn.*": [1] * 9 + [2, 4, 6], "mlp.*": [6, 4, 2] + [1] * 9},
        )
    ],
)
