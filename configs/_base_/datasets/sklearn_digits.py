# The embedded data set: scikit-learn's digits, 8 -> 32 pixels; training images are randomly cropped. No preparation.
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="SklearnDigits",
        split="train",
        transform=dict(
            input_size=32,
            is_training=True,
            scale=(0.6, 1.0),
            ratio=(0.9, 1.1),
            hflip=0.0,
            color_jitter=None,
            interpolation="bilinear",
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="SklearnDigits",
        split="val",
        transform=dict(input_size=32, crop_pct=1.0, interpolation="bilinear"),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
