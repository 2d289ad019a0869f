# ImageNet weights of DeiT-Tiny, with the norm before each; checkpoint may also be a file.
_base_ = "../deit-tiny_cifar100.py"

model = dict(
    init_cfg=[
        *_base_.model.init_cfg,  # noqa: F821
        dict(
            type="PretrainedParts",
            checkpoint="timm://deit_tiny_patch16_224.fb_in1k",
            parts=["norm1", "attn"],
        ),
    ]
)
