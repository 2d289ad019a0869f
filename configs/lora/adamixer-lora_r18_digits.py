# A detector of the digits 0 to 7 learns all ten: first train adamixer_r18_digits-0-7.py, then this. The weights of the
# file are frozen; adapters of rank 2 and the layers that score the ten classes are trained, 1.8 % of all.
_base_ = "../adamixer/adamixer_r18_digits.py"

model = dict(
    _delete_=True,
    type="WithLoRA",
    model=_base_.model,  # noqa: F821
    checkpoint="work_dirs/adamixer_r18_digits-0-7/epoch_18.pth",
    targets=[
        "backbone.layer[23].*.conv?",
        "neck.convs.*",
        "decoder.stages.*.mixing.out_proj",
        "decoder.stages.*.ffn.*",
        "decoder.stages.*.cls_branch.0",
    ],
    rank=2,
    alpha=4,
    train=["decoder.stages.*.cls_branch.3.*"],
)
train_cfg = dict(max_epochs=6, val_interval=6)
optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=6, T_max=6, convert_to_iter_based=True),
]
val_evaluator = dict(classwise=True)
test_evaluator = val_evaluator
