# mmdet's own COCO settings: resize to (1333, 800), flip, 2 images per GPU.
_base_ = "mmdet::_base_/datasets/coco_detection.py"
