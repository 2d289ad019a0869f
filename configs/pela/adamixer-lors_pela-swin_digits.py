# A small Swin at two thirds of its size, from scratch: the same strides and channels as the ResNet that it replaces.
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
