# Table 3 of the PELA paper. Optimizer, schedule and augmentation are those of MMDetection's Swin; the box heads, four
# convolutions and a fully connected layer with GIoU, are those with which Swin's authors have 145.0 M parameters. The
# checkpoint is the uncompressed Swin-B, which is factorised when it is loaded. For a distilled student, write it with
# `extract_student.py --mmdet-swin` and set model.backbone.backbone.init_cfg.checkpoint to that file.
_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "../_base_/datasets/coco-instance_crop-ms-480-800.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

_box_heads = [
    dict(
        type="ConvFCBBoxHead",
        num_shared_convs=4,
        num_shared_fcs=1,
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[xy, xy, wh, wh]),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
    )
    for xy, wh in [(0.1, 0.2), (0.05, 0.1), (0.033, 0.067)]
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="PELABackbone",
        backbone=dict(
            type="SwinTransformer",
            embed_dims=128,
            depths=[2, 2, 18, 2],
            num_heads=[4, 8, 16, 32],
            window_size=7,
            mlp_ratio=4,
            drop_path_rate=0.3,
            convert_weights=True,
            init_cfg=dict(
                type="Pretrained",
                checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
                "swin_base_patch4_window7_224.pth",
            ),
        ),
        ratio=1.5,
        omit=["norm", "patch_embed", "downsample", "attn.w_msa.proj"],
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
    roi_head=dict(bbox_head=_box_heads),
)
del _box_heads
train_cfg = dict(max_epochs=36)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
