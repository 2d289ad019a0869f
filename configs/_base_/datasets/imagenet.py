# ImageNet, or any data with one folder per class in data_root/train and data_root/val: 224 pixels, random crop, flip.
data_root = "data/imagenet/"

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageFolder",
        data_root=data_root,
        split="train",
        transform=dict(input_size=224, is_training=True, color_jitter=None, interpolation="bicubic"),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageFolder",
        data_root=data_root,
        split="val",
        transform=dict(input_size=224, crop_pct=0.875, interpolation="bicubic"),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
