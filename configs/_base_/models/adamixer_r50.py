model = dict(
    type="QueryBased",
    channels_last="cpu",
    data_preprocessor=dict(
        type="NonBlockingDetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="ResNet",
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(type="ChannelMapping", in_channels=[256, 512, 1024, 2048], out_channels=256),
    query_generator=dict(type="InitialQueryGenerator", num_queries=100, content_dim=256),
    decoder=dict(
        type="AdaMixerDecoder",
        num_stages=6,
        num_classes=80,
        featmap_strides=[4, 8, 16, 32],
        stage=dict(
            type="AdaMixerDecoderStage",
            content_dim=256,
            feat_channels=256,
            num_heads=8,
            ffn_channels=2048,
            num_groups=4,
            in_points=32,
            out_points=128,
        ),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=100),
)
