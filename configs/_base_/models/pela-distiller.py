# Intermediate pre-training on ImageNet: a frozen timm classifier and its compressed copy.
model = dict(
    type="PELADistiller",
    teacher=dict(
        type="TimmClassifier",
        data_preprocessor=dict(
            type="ImgDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], non_blocking=True
        ),
        network=dict(),
        num_classes=1000,
        label_smoothing=0.1,
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
    ),
    student=dict(network=dict(drop_path_rate=0.1)),
    ratio=2,
    omit=["norm", "head", "patch_embed", "downsample"],
    feature_loss=dict(type="FeatureDistillationLoss", loss_weight=1.0),
    perturbation_loss=dict(type="WeightPerturbationLoss", loss_weight=1.0, eps=0.0),
)
