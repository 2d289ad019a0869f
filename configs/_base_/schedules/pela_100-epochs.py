# As DeiT's, but with a third of its epochs and a tenth of its learning rate, because it starts from a trained model.
# The paper does not say how long it trains; this is our choice.
_base_ = "deit_300-epochs.py"

train_cfg = dict(max_epochs=100)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=5, end=100, T_max=95, convert_to_iter_based=True),
]
