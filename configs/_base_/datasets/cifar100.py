# CIFAR-100, 32 -> 56 pixels; training images are flipped at random. data/cifar100 contains cifar-100-python/.
data_root = "data/cifar100/"

train_dataloader = dict(
    batch_size=128,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="CIFAR100",
        data_root=data_root,
        split="train",
        transform=dict(
            input_size=56,
            is_training=True,
            scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            hflip=0.5,
            color_jitter=None,
            interpolation="bicubic",
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=4,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="CIFAR100",
        data_root=data_root,
        split="val",
        transform=dict(input_size=56, crop_pct=1.0, interpolation="bicubic"),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
