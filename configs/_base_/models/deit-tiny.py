# DeiT-Tiny for 56 pixels in patches of 4: 197 tokens, as many as for 224 pixels in patches of 16.
model = dict(
    type="TimmClassifier",
    data_preprocessor=dict(
        type="ImgDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], non_blocking=True
    ),
    network=dict(model_name="deit_tiny_patch16_224", img_size=56, patch_size=4, drop_path_rate=0.1),
    num_classes=100,
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
)
