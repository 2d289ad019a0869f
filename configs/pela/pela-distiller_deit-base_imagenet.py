_base_ = [
    "../_base_/models/pela-distiller.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/pela_100-epochs.py",
    "../_base_/classification_runtime.py",
]

model = dict(
    teacher=dict(network=dict(model_name="deit_base_patch16_224")),
    teacher_checkpoint="timm://deit_base_patch16_224",
)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.9)))
test_dataloader = val_dataloader
