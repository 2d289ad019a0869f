# adamixer-lors_r18_digits.py in mmengine's new style: classes instead of names. Both build the same model.
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.models.backbones import ResNet
from mmdet.models.losses import FocalLoss, GIoULoss, L1Loss
from mmdet.models.task_modules.assigners import BBoxL1Cost, FocalLossCost, HungarianAssigner, IoUCost
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

from mmdet_lors.adamixer.data_preprocessor import NonBlockingDetDataPreprocessor
from mmdet_lors.adamixer.decoder import AdaMixerDecoder
from mmdet_lors.adamixer.detector import QueryBased
from mmdet_lors.adamixer.neck import ChannelMapping
from mmdet_lors.adamixer.query_generator import InitialQueryGenerator
from mmdet_lors.adamixer.stage import AdaMixerDecoderStage
from mmdet_lors.datasets import CheckedCocoDataset, CheckedCocoMetric

with read_base():
    from .._base_.new_style_runtime import *  # noqa: F403

model = dict(
    type=QueryBased,
    channels_last="cpu",
    data_preprocessor=dict(
        type=NonBlockingDetDataPreprocessor,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type=ResNet,
        depth=18,
        base_channels=32,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
        init_cfg=None,
    ),
    neck=dict(type=ChannelMapping, in_channels=[32, 64, 128], out_channels=64),
    query_generator=dict(type=InitialQueryGenerator, num_queries=20, content_dim=64),
    decoder=dict(
        type=AdaMixerDecoder,
        num_stages=3,
        num_classes=10,
        featmap_strides=[4, 8, 16],
        stage=dict(
            type=AdaMixerDecoderStage,
            content_dim=64,
            feat_channels=64,
            num_heads=4,
            ffn_channels=256,
            num_groups=2,
            in_points=16,
            out_points=32,
        ),
        lors=dict(adaptive=dict(rank=8, groups=[1, 1, 2]), static=dict(rank=8, groups=1)),
        loss_cls=dict(type=FocalLoss, use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type=L1Loss, loss_weight=5.0),
        loss_iou=dict(type=GIoULoss, loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type=HungarianAssigner,
            match_costs=[
                dict(type=FocalLossCost, weight=2.0),
                dict(type=BBoxL1Cost, weight=5.0),
                dict(type=IoUCost, iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=20),
)

data_root = "data/digits/"
metainfo = dict(classes=tuple("0123456789"))
train_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=Resize, scale=(96, 96), keep_ratio=True),
    dict(type=PackDetInputs),
]
test_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=Resize, scale=(96, 96), keep_ratio=True),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=PackDetInputs, meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(
        type=CheckedCocoDataset,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    drop_last=False,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CheckedCocoDataset,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=CheckedCocoMetric, ann_file=data_root + "annotations/val.json", metric="bbox")
test_evaluator = val_evaluator

train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=18, val_interval=18)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=5e-4, weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type=CosineAnnealingLR, by_epoch=True, begin=0, end=18, T_max=18, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)
randomness = dict(seed=0)
