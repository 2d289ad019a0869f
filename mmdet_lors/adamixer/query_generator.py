"""The initial queries: a learned content vector each, all placed on the whole image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_lors.transfer import to_device


@MODELS.register_module()
class InitialQueryGenerator(BaseModule):
    """Content = learned embedding, normalised at use; position = the whole image, a constant.

    The positions are computed, not stored: the reference keeps them in an embedding that never gets a gradient.

    Args:
        num_queries: N.
        content_dim: d.
    """

    def __init__(self, num_queries: int = 100, content_dim: int = 256, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.num_queries, self.content_dim = num_queries, content_dim
        self.content = nn.Embedding(num_queries, content_dim)

    def init_weights(self) -> None:
        """Standard normal content."""
        super().init_weights()
        nn.init.normal_(self.content.weight)

    def forward(self, img_shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Queries for a batch.

        Args:
            img_shapes: (H, W) of each image without padding, in pixels.

        Returns:
            Positions (B, N, 4), (W/2, H/2, log2 sqrt(W H), log2(H / W)), and content (B, N, d), a LayerNorm
            without affine over the embedding.
        """
        content = F.layer_norm(self.content.weight, (self.content_dim,))
        h, w = to_device([tuple(s[:2]) for s in img_shapes], content).unbind(-1)
        xyzr = torch.stack([w / 2, h / 2, (w * h).log2() / 2, (h / w).log2()], dim=-1)
        batch = len(img_shapes)
        return (
            xyzr[:, None].expand(batch, self.num_queries, 4),
            content.expand(batch, self.num_queries, self.content_dim),
        )
