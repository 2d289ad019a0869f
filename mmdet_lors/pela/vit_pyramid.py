"""A timm Vision Transformer as a detector's backbone."""

from collections.abc import Mapping

from mmdet.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .timm_vit import TimmViT


@MODELS.register_module()
class ViTPyramid(TimmViT):
    """A plain ViT and the simple pyramid that ViTDet (arXiv:2203.16527, section 3) makes of its last map.

    A ViT of patch size p and width d has one map, (d, H / p, W / p). Two transposed convolutions make (d / 4, 4 H / p,
    4 W / p) of it, one makes (d / 2, 2 H / p, 2 W / p), and pooling makes (d, H / 2p, W / 2p): strides 4, 8, 16, 32
    for p = 16. Attention is global: ViTDet's windows are not here.

    Args:
        model_name, vit, init_cfg: see :class:`~mmdet_lors.pela.timm_vit.TimmViT`, also for what it raises.
    """

    def __init__(self, model_name: str, vit: Mapping | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(model_name, vit, init_cfg)
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

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> four maps, strides p / 4, p / 2, p and 2 p; channels are ``out_channels``."""
        (features,) = self.vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return tuple(level(features) for level in self.levels)
