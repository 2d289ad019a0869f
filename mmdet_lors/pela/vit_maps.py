"""A timm Vision Transformer as a segmentor's backbone."""

from collections.abc import Mapping, Sequence

from mmdet.registry import MODELS
from torch import Tensor, nn

from mmdet_lors.errors import UserError

from .timm_vit import TimmViT


@MODELS.register_module()
class ViTMaps(TimmViT):
    """A plain ViT of patch size p and width d, and the maps (d, H / p, W / p) that leave some of its blocks.

    The same maps as mmsegmentation's VisionTransformer. That one keeps query, key and value in one parameter of
    ``nn.MultiheadAttention``, which :func:`mmdet_lors.pela.compress` does not find, and its names are not those of a
    distilled student; here they are Linears under timm's names.

    Args:
        out_indices: the blocks, from 0, each larger than the one before; the ViT's own last norm is not applied.
        model_name, vit, init_cfg: see :class:`~mmdet_lors.pela.timm_vit.TimmViT`, also for what it raises.

    Raises:
        UserError: ``out_indices`` that are not in that order, or that the ViT does not have, or without its last block.
    """

    def __init__(
        self, model_name: str, out_indices: Sequence[int], vit: Mapping | None = None, init_cfg: dict | None = None
    ) -> None:
        super().__init__(model_name, vit, init_cfg)
        depth, indices = len(self.vit.blocks), list(out_indices)
        # A block behind the last map would be trained by nothing, which distributed training refuses.
        if indices != sorted(set(indices)) or not indices or indices[0] < 0 or indices[-1] != depth - 1:
            raise UserError(f"backbone.out_indices must rise from 0 or more to the last block, {depth - 1}: {indices}")
        self.out_indices = indices
        self.out_channels = [self.vit.embed_dim] * len(indices)
        self.vit.norm = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> one map (B, d, H / p, W / p) per block of ``out_indices``."""
        return tuple(self.vit.forward_intermediates(x, indices=self.out_indices, norm=False, intermediates_only=True))
