# Table 2 of the PELA paper, Swin-B at two thirds of its size. Everything but the compression is mmsegmentation's own
# config. For a distilled student, see docs/pela_recipes.md.
_base_ = "mmseg::swin/swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["mmdet_lors"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.PELABackbone",
        backbone=_base_.model.backbone,  # noqa: F821
        ratio=1.5,
        omit=["norm", "patch_embed", "downsample", "attn.w_msa.proj"],
    ),
)
