# The whole recipe in minutes on a CPU: first train configs/classification/vit_digits.py, then this.
_base_ = "../classification/vit_digits.py"

model = dict(
    _delete_=True,
    type="PELADistiller",
    teacher=_base_.model,  # noqa: F821
    teacher_checkpoint="work_dirs/vit_digits/epoch_60.pth",
    ratio=2,
    omit=["norm", "head", "patch_embed"],
    feature_loss=dict(type="FeatureDistillationLoss", loss_weight=1.0),
    perturbation_loss=dict(type="WeightPerturbationLoss", loss_weight=1.0, eps=0.0),
)
train_cfg = dict(max_epochs=20)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=1, end=20, T_max=19, convert_to_iter_based=True),
]
