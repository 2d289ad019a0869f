_base_ = [
    "../_base_/models/adamixer-lors_r50.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamixer_1x.py",
    "../_base_/default_runtime.py",
]
