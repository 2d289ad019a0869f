_base_ = "adamixer_r50_300-queries_crop-ms-480-800-3x_coco.py"

model = dict(
    channels_last=False,  # mmcv's deformable convolutions do not take it
    backbone=dict(
        type="ResNeXt",
        depth=101,
        groups=32,
        base_width=4,
        dcn=dict(type="DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
        init_cfg=dict(checkpoint="open-mmlab://resnext101_32x4d"),
    ),
)
