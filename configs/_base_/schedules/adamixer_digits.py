# Minutes on two CPU cores: a short warm-up, then cosine to zero.
_base_ = "adamixer_1x.py"

train_cfg = dict(max_epochs=18, val_interval=18)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=18, T_max=18, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=8)
