"""The neck: brings every backbone level to one number of channels."""

from collections.abc import Sequence

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_lors.errors import UserError


@MODELS.register_module()
class ChannelMapping(BaseModule):
    """One 1x1 convolution with bias per level, then ONE GroupNorm that all levels share.

    It differs from mmdet's ``ChannelMapper``, which owns a norm per level.

    Args:
        in_channels: channels of each backbone level.
        out_channels: channels of every output level.
        num_norm_groups: groups of the GroupNorm.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_norm_groups: int = 32,
        init_cfg: dict | None = None,
    ) -> None:
        init_cfg = init_cfg or dict(type="Xavier", layer="Conv2d", distribution="uniform")
        super().__init__(init_cfg)
        if out_channels % num_norm_groups:
            raise UserError(f"neck.out_channels {out_channels} is not divisible by num_norm_groups {num_norm_groups}")
        self.convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.norm = nn.GroupNorm(num_norm_groups, out_channels)

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Levels (B, in_channels[l], H_l, W_l) -> levels (B, out_channels, H_l, W_l)."""
        if len(feats) != len(self.convs):
            raise UserError(f"neck.in_channels has {len(self.convs)} entries, the backbone gives {len(feats)} levels")
        return tuple(self.norm(conv(x)) for conv, x in zip(self.convs, feats, strict=True))
