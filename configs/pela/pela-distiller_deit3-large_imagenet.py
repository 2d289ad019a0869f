# As released: 4 GPUs x 16 images, the feature loss alone, an average of the weights that is what is evaluated.
_base_ = [
    "../_base_/models/pela-distiller.py",
    "../_base_/datasets/imagenet_rand-augment.py",
    "../_base_/schedules/pela.py",
    "../_base_/classification_runtime.py",
]

model = dict(
    teacher=dict(network=dict(model_name="deit3_large_patch16_224")),
    teacher_checkpoint="timm://deit3_large_patch16_224",
    student=dict(network=dict(drop_path_rate=0.45)),
    perturbation_loss=None,
)
train_dataloader = dict(batch_size=16)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=20)
optim_wrapper = dict(optimizer=dict(lr=3.125e-5, weight_decay=0.1))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6 / 3.125e-5, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=20, T_max=19, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(average=dict(type="EMAHook", momentum=4e-5))
