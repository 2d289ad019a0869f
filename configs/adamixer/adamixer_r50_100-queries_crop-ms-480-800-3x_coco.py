_base_ = [
    "../_base_/models/adamixer_r50.py",
    "../_base_/datasets/coco_crop-ms-480-800.py",
    "../_base_/schedules/adamixer_3x.py",
    "../_base_/default_runtime.py",
]
