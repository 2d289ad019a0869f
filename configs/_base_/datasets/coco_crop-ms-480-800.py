# COCO with DETR's augmentation: multi-scale 480-800, or resize, crop and resize again.
_base_ = "coco_ms-480-800.py"

train_pipeline = _base_.train_pipeline  # noqa: F821
_resize = train_pipeline[3]
train_pipeline[3] = dict(
    type="RandomChoice",
    transforms=[
        [_resize],
        [
            dict(type="RandomChoiceResize", scales=[(s, 1333) for s in (400, 500, 600)], keep_ratio=True),
            dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
            _resize,
        ],
    ],
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
del _resize
