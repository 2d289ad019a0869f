"""The two COCO data configs with DETR's crop differ in the masks and in nothing else."""

from conftest import ROOT
from mmengine.config import Config


def without_masks(node):
    """Lists and dicts without what concerns masks."""
    if isinstance(node, dict):
        hidden = ("_scope_", "with_mask")
        return {k: "bbox" if k == "metric" else without_masks(v) for k, v in node.items() if k not in hidden}
    return [without_masks(item) for item in node] if isinstance(node, (list, tuple)) else node


def test_masks_are_loaded_and_evaluated_and_nothing_else_changes():
    boxes, masks = (
        Config.fromfile(ROOT / f"configs/_base_/datasets/{name}_crop-ms-480-800.py").to_dict()
        for name in ("coco", "coco-instance")
    )
    assert without_masks(boxes) == without_masks(masks) and boxes != masks
    for split in ("train", "val", "test"):
        loaded = [s for s in masks[f"{split}_dataloader"]["dataset"]["pipeline"] if s["type"] == "LoadAnnotations"]
        assert [(step["with_bbox"], step["with_mask"]) for step in loaded] == [(True, True)]
    assert masks["val_evaluator"]["metric"] == masks["test_evaluator"]["metric"] == ["bbox", "segm"]
