# Minutes on two CPU cores: a short warm-up, then cosine to zero.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=16, val_interval=4)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=16, T_max=16, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
