# COCO with DETR's augmentation: multi-scale 480-800, or resize, crop and resize again.
_base_ = "mmdet::_base_/datasets/coco_detection.py"

_scales = [(side, 1333) for side in range(480, 801, 32)]
_resize = dict(type="RandomChoiceResize", scales=_scales, keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [_resize],
            [
                dict(type="RandomChoiceResize", scales=[(s, 1333) for s in (400, 500, 600)], keep_ratio=True),
                dict(
                    type="RandomCrop",
                    crop_type="absolute_range",
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                _resize,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(type="CheckedCocoDataset", pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type="CheckedCocoDataset"))
test_dataloader = dict(dataset=dict(type="CheckedCocoDataset"))
val_evaluator = dict(type="CheckedCocoMetric")
test_evaluator = dict(type="CheckedCocoMetric")
del _scales, _resize
