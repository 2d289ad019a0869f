# LORST in DINO's encoder as well.
_base_ = "dino-lors_r50_8xb2-12e_coco.py"

model = dict(
    stacks=[
        *_base_.model.stacks,
        dict(
            layers="encoder.layers",
            targets=["self_attn.*_proj", "ffn.*"],
            rank=16,
            groups=[1, 1, 2, 2, 3, 3],
        ),
    ]
)
