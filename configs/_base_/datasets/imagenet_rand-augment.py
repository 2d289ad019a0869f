# ImageNet with timm's RandAugment, which takes the place of colour jitter: timm ignores color_jitter beside it.
_base_ = "imagenet.py"

train_dataloader = dict(
    batch_size=64,
    dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3)),
)
