# As 3x, but twice the warm-up, and no weight decay on norms and relative position biases.
_base_ = "adamixer_3x.py"

optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)},
    )
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[24, 33], gamma=0.1),
]
