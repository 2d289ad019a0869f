# mmdet's own COCO settings: resize to (1333, 800), flip, 2 images per GPU; bad annotations and images are reported.
_base_ = "mmdet::_base_/datasets/coco_detection.py"

train_dataloader = dict(dataset=dict(type="CheckedCocoDataset"))
val_dataloader = dict(dataset=dict(type="CheckedCocoDataset"))
test_dataloader = dict(dataset=dict(type="CheckedCocoDataset"))
val_evaluator = dict(type="CheckedCocoMetric")
test_evaluator = dict(type="CheckedCocoMetric")
