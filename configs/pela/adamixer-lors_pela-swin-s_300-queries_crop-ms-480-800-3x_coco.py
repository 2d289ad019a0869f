# Both papers in one detector: PELA compresses the backbone by a third, LORS the decoder.
_base_ = "../lors/adamixer-lors_swin-s_300-queries_crop-ms-480-800-3x_coco.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PELABackbone",
        backbone=_base_.model.backbone,  # noqa: F821
        ratio=1.5,
        omit=["norm", "patch_embed", "downsample", "attn.w_msa.proj"],
    )
)
