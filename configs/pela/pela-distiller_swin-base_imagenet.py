# As released: Swin-B without a third of its weights, attention's projections whole; 4 GPUs x 64 images, both losses.
_base_ = [
    "../_base_/models/pela-distiller.py",
    "../_base_/datasets/imagenet_rand-augment.py",
    "../_base_/schedules/pela.py",
    "../_base_/classification_runtime.py",
]

model = dict(
    teacher=dict(
        network=dict(model_name="swin_base_patch4_window7_224"),
        random_erasing=dict(probability=0.25, mode="pixel"),
    ),
    teacher_checkpoint="timm://swin_base_patch4_window7_224.ms_in1k",
    student=dict(network=dict(drop_path_rate=0.5)),
    ratio=1.5,
    omit=["norm", "head", "patch_embed", "downsample", "attn.proj"],
)
train_dataloader = dict(dataset=dict(transform=dict(color_jitter=0.4)))
optim_wrapper = dict(
    optimizer=dict(lr=1.25e-5),
    paramwise_cfg=dict(custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-8 / 1.25e-5, begin=0, end=3, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-9, begin=3, end=50, T_max=47, convert_to_iter_based=True),
]
