# mmdet's DAB-DETR with LORST in its decoder. cross_attn.qpos_proj is left out: only the first layer has it.
_base_ = "mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py"

custom_imports = dict(imports=["mmdet_lors"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="WithLORS",
    model=_base_.model,
    stacks=[
        dict(
            layers="decoder.layers",
            targets=[
                "self_attn.*",
                "cross_attn.?content_proj",
                "cross_attn.kpos_proj",
                "cross_attn.qpos_sine_proj",
                "cross_attn.v_proj",
                "cross_attn.out_proj",
                "ffn.*",
            ],
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
