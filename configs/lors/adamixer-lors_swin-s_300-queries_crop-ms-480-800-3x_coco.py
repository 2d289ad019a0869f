_base_ = [
    "../_base_/models/adamixer-lors_r50.py",
    "../_base_/datasets/coco_crop-ms-480-800.py",
    "../_base_/schedules/adamixer_3x_swin.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        mlp_ratio=4,
        drop_path_rate=0.2,
        convert_weights=True,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
            "swin_small_patch4_window7_224.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    query_generator=dict(num_queries=300),
    test_cfg=dict(max_per_img=300),
)
