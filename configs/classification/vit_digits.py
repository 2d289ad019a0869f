# A small vision transformer that learns scikit-learn's digits from scratch: 6 layers of 96 channels, 16 patches.
_base_ = [
    "../_base_/models/deit-tiny.py",
    "../_base_/datasets/sklearn_digits.py",
    "../_base_/schedules/vit_digits.py",
    "../_base_/classification_runtime.py",
]

model = dict(
    data_preprocessor=dict(mean=[127.5], std=[127.5]),
    network=dict(img_size=32, patch_size=8, in_chans=1, embed_dim=96, depth=6, num_heads=3),
    num_classes=10,
    mixup=None,
    init_cfg=None,
)
randomness = dict(seed=0)
