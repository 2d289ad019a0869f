# As coco_crop-ms-480-800, with masks: loaded, and evaluated.
_base_ = "coco_crop-ms-480-800.py"

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline  # noqa: F821
_val_pipeline = _base_.val_dataloader.dataset.pipeline  # noqa: F821
for _step in (*train_pipeline, *test_pipeline, *_val_pipeline):
    if _step["type"] == "LoadAnnotations":
        _step["with_mask"] = True
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_val_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
del _step, _val_pipeline
