# A plain ViT as the backbone: DeiT-B at half its size, with ViTDet's simple pyramid. For a distilled student, set
# model.backbone.init_cfg.checkpoint to the file that extract_student.py writes.
_base_ = [
    "../_base_/models/adamixer-lors_r50.py",
    "../_base_/datasets/coco_crop-ms-480-800.py",
    "../_base_/schedules/adamixer_3x_swin.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="PELABackbone",
        backbone=dict(type="ViTPyramid", model_name="deit_base_patch16_224", vit=dict(drop_path_rate=0.1)),
        ratio=2,
        omit=["norm", "patch_embed"],
        init_cfg=dict(type="Pretrained", checkpoint="timm://deit_base_patch16_224"),
    ),
    neck=dict(in_channels=[192, 384, 768, 768]),
    query_generator=dict(num_queries=300),
    test_cfg=dict(max_per_img=300),
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={"cls_token": dict(decay_mult=0.0), "pos_embed": dict(decay_mult=0.0)})
)
