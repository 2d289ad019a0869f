# A small Swin at two thirds of its size, trained from scratch, with the strides and channels of the ResNet it replaces.
_base_ = "../lors/adamixer-lors_r18_digits.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PELABackbone",
        backbone=dict(
            type="SwinTransformer",
            embed_dims=32,
            depths=[1, 1, 2],
            num_heads=[2, 4, 8],
            window_size=6,
            out_indices=(0, 1, 2),
            drop_path_rate=0.0,
        ),
        ratio=1.5,
        omit=["norm", "patch_embed", "downsample", "attn.w_msa.proj"],
    )
)
