# Table 2 of the PELA paper, DeiT-B at half its size. Everything but the backbone is mmsegmentation's own config of
# DeiT-B. For a distilled student, set model.backbone.init_cfg.checkpoint to the file that extract_student.py writes.
_base_ = "mmseg::vit/vit_deit-b16_upernet_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["mmdet_lors"], allow_failed_imports=False)
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="mmdet.PELABackbone",
        backbone=dict(
            type="mmdet.ViTMaps",
            model_name="deit_base_patch16_224",
            out_indices=[2, 5, 8, 11],
            vit=dict(img_size=512, drop_path_rate=0.1),
        ),
        ratio=2,
        omit=["norm", "patch_embed"],
        init_cfg=dict(type="Pretrained", checkpoint="timm://deit_base_patch16_224"),
    ),
)
