# mmdet's Deformable DETR with iterative box refinement, with LORST in its decoder. In the deformable attention, offsets
# and attention weights stay private to each layer: they start from a fixed pattern, with zero weights.
_base_ = "mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"

custom_imports = dict(imports=["mmdet_lors"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="WithLORS",
    model=_base_.model,
    stacks=[
        dict(
            layers="decoder.layers",
            targets=["self_attn.*", "cross_attn.*_proj", "ffn.*"],
            rank=16,
            groups=[1, 1, 2, 2, 3, 3],
        )
    ],
)
# Bad annotations and images are reported, as in our own configs.
train_dataloader = dict(dataset=dict(type="CheckedCocoDataset"))
val_dataloader = dict(dataset=dict(type="CheckedCocoDataset"))
test_dataloader = dict(dataset=dict(type="CheckedCocoDataset"))
val_evaluator = dict(type="CheckedCocoMetric")
test_evaluator = dict(type="CheckedCocoMetric")
