# mmdet's DINO with four scales, with LORST in its decoder.
_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"

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
