# Under 3 minutes on two CPU cores.
_base_ = "deit_300-epochs.py"

train_cfg = dict(max_epochs=60, val_interval=20)
optim_wrapper = dict(optimizer=dict(lr=1e-3, fused=True))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=4, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=4, end=60, T_max=56, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=64)
