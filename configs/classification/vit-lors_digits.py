_base_ = "vit_digits.py"

model = dict(
    _delete_=True,
    type="WithLORS",
    model=_base_.model,  # noqa: F821
    stacks=[
        dict(
            layers="network.blocks",
            targets=["attn.*", "mlp.*"],
            rank=8,
            groups={"attn.*": [1, 1, 1, 1, 2, 3], "mlp.*": [3, 2, 1, 1, 1, 1]},
        )
    ],
)
