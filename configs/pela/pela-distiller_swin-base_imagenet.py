# Swin-B without a third of its weights; its attention's projections stay uncompressed.
_base_ = [
    "../_base_/models/pela-distiller.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/pela_100-epochs.py",
    "../_base_/classification_runtime.py",
]

model = dict(
    teacher=dict(network=dict(model_name="swin_base_patch4_window7_224")),
    teacher_checkpoint="timm://swin_base_patch4_window7_224.ms_in1k",
    student=dict(network=dict(drop_path_rate=0.5)),
    ratio=1.5,
    omit=["norm", "head", "patch_embed", "downsample", "attn.proj"],
)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.9)))
test_dataloader = val_dataloader
