# DeiT-Tiny for 56 pixels in patches of 4: 197 tokens, as many as for 224 pixels in patches of 16. CIFAR's mean and std.
model = dict(
    type="TimmClassifier",
    data_preprocessor=dict(
        type="ImgDataPreprocessor",
        mean=[129.304, 124.070, 112.434],
        std=[68.170, 65.392, 70.418],
        non_blocking=True,
    ),
    network=dict(model_name="deit_tiny_patch16_224", img_size=56, patch_size=4, drop_path_rate=0.0),
    num_classes=100,
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
    init_cfg=[
        dict(type="Kaiming", layer="Conv2d", mode="fan_in", nonlinearity="linear"),
        dict(type="TruncNormal", layer="Linear", std=0.02),
    ],
)
