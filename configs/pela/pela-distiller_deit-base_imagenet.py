# As released: 4 GPUs x 64 images, the feature loss alone, an average of the weights that is what is evaluated.
_base_ = [
    "../_base_/models/pela-distiller.py",
    "../_base_/datasets/imagenet_rand-augment.py",
    "../_base_/schedules/pela.py",
    "../_base_/classification_runtime.py",
]

model = dict(
    teacher=dict(
        network=dict(model_name="deit_base_patch16_224"),
        random_erasing=dict(probability=0.25, mode="pixel"),
    ),
    teacher_checkpoint="timm://deit_base_patch16_224",
    perturbation_loss=None,
)
train_dataloader = dict(sampler=dict(type="RepeatedAugmentation"))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6 / 6.25e-5, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=50, T_max=49, convert_to_iter_based=True),
]
default_hooks = dict(average=dict(type="EMAHook", momentum=4e-5))
