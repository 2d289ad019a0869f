# ImageNet weights of DeiT-Tiny, with the norm before each; checkpoint may be a file, too.
_base_ = "../deit-tiny_cifar100.py"

model = dict(
    init_cfg=dict(
        type="PretrainedParts",
        checkpoint="timm://deit_tiny_patch16_224.fb_in1k",
        parts=["norm1", "attn"],
    )
)
