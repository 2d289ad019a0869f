_base_ = "dino_r18_digits.py"

model = dict(
    _delete_=True,
    type="WithLORS",
    model=_base_.model,
    stacks=[
        dict(
            layers="decoder.layers",
            targets=["self_attn.*", "cross_attn.*_proj", "ffn.*"],
            rank=8,
            groups=[1, 1, 2],
        )
    ],
)
