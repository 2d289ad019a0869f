# AdaMixer's own 3x with 100 queries: no crops, and steps of its own. The pair with LORS is crop-ms-480-800-3x.
_base_ = [
    "../_base_/models/adamixer_r50.py",
    "../_base_/datasets/coco_ms-480-800.py",
    "../_base_/schedules/adamixer_3x.py",
    "../_base_/default_runtime.py",
]

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
