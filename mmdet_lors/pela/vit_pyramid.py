"""A timm Vision Transformer as a detector's backbone."""

from collections.abc import Mapping

import timm
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mmdet_lors.classification.pretrained import read_weights
from mmdet_lors.errors import UserError

PATCHES = "patch_embed.proj.weight"
"""A weight that every ViT of timm has: what stands before it in a file is the ViT's own prefix there."""


@MODELS.register_module()
class ViTPyramid(BaseModule):
    """A plain ViT and the simple pyramid that ViTDet (arXiv:2203.16527, section 3) makes of its last map.

    A ViT of patch size p and width d has one map, (d, H / p, W / p). Two transposed convolutions make (d / 4, 4 H / p,
    4 W / p) of it, one makes (d / 2, 2 H / p, 2 W / p), and pooling makes (d, H / 2p, W / 2p): strides 4, 8, 16, 32
    for p = 16. Attention is global: ViTDet's windows are not here. Position embeddings are interpolated to the image.

    Args:
        model_name: a ViT or DeiT of timm.
        vit: further arguments of ``timm.create_model``, such as ``drop_path_rate``.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``: 'timm://NAME', or a file in which the ViT's weights have
            timm's names behind any prefix: timm's own, a classifier's, or a student's that was extracted.

    Raises:
        UserError: ``model_name`` is not one of timm's ViTs; a file without the ViT's weights, in ``init_weights``.
    """

    def __init__(self, model_name: str, vit: Mapping | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if init_cfg is not None and init_cfg.get("type") != "Pretrained":
            raise UserError(f"backbone.init_cfg must be of type 'Pretrained', got {init_cfg.get('type')!r}")
        size = dict(dynamic_img_size=True, dynamic_img_pad=True)
        try:
            self.vit = timm.create_model(model_name, num_classes=0, **size, **dict(vit or {}))
        except (RuntimeError, TypeError) as error:
            raise UserError(f"backbone.model_name {model_name!r} is no ViT of timm: {error}") from error
        dim = self.vit.embed_dim
        self.out_channels = [dim // 4, dim // 2, dim, dim]
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                    LayerNorm2d(dim // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
                ),
                nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def init_weights(self) -> None:
        """Load the ViT's weights, if there are any to load; the pyramid keeps PyTorch's start."""
        if self.init_cfg is None:
            return
        path = self.init_cfg["checkpoint"]
        weights = read_weights(path)
        prefix = next((key.removesuffix(PATCHES) for key in weights if key.endswith(PATCHES)), None)
        if prefix is None:
            raise UserError(f"checkpoint {path} has no {PATCHES}: it holds no ViT of timm")
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        try:
            missing, _ = self.vit.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise UserError(f"checkpoint {path} is of another ViT: {str(error).splitlines()[-1].strip()}") from error
        if missing:
            raise UserError(
                f"checkpoint {path} lacks {len(missing)} of the ViT's weights ({', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''})"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> four maps, strides p / 4, p / 2, p and 2 p; channels are ``out_channels``."""
        (features,) = self.vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return tuple(level(features) for level in self.levels)
