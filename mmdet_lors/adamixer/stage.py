"""One decoder stage: self-attention, sampling, mixing, FFN, and the two heads."""

from typing import NamedTuple

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmdet.registry import MODELS
from mmengine.model import BaseModule, bias_init_with_prob
from torch import Tensor, nn

from mmdet_lors.errors import UserError

from .boxes import log_iof, position_encoding, refine_xyzr
from .mixing import AdaptiveMixing, Generator, Projection
from .precision import full_precision
from .sampling import AdaptiveSampling, Pyramid


def branch(dim: int, num_fcs: int, out: int) -> nn.Sequential:
    """A head: ``num_fcs`` times Linear-LN-ReLU, then Linear(dim -> out)."""
    layers: list[nn.Module] = []
    for _ in range(num_fcs):
        layers += [nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(dim, out))


class StageOutput(NamedTuple):
    """What one stage predicts."""

    cls_score: Tensor
    """Class logits (B, N, num_classes)."""
    xyzr: Tensor
    """Refined positions (B, N, 4)."""
    bboxes: Tensor
    """The same as boxes (x1, y1, x2, y2) in input pixels, (B, N, 4)."""
    content: Tensor
    """Content (B, N, d)."""


class QuerySelfAttention(nn.MultiheadAttention):
    """Self-attention over queries, its logits biased by tau_head * log(IoF(box_i, box_j) + 1e-7).

    tau is learned, one per head. Input, queries, keys, values and the residual are all content + position
    encoding; neither the encoding nor the IoF carries a gradient.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, batch_first=True)
        self.tau = nn.Parameter(torch.empty(num_heads).uniform_(0, 4))

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:  # type: ignore[override]  # with its own arguments
        """Content (B, N, d) and positions (B, N, 4), detached -> (B, N, d)."""
        x = content + position_encoding(xyzr, self.embed_dim).to(content.dtype)
        bias = self.tau[:, None, None] * log_iof(xyzr)[:, None]
        attended, _ = super().forward(x, x, x, attn_mask=bias.flatten(0, 1).to(x.dtype), need_weights=False)
        return x + attended


@MODELS.register_module()
class AdaMixerDecoderStage(BaseModule):
    """One stage of AdaMixer's decoder; refines every query's content and position.

    Under autocast, positions, IoF, offsets, sampling and both heads stay in float32.

    Args:
        num_classes: classes, without background.
        content_dim: d.
        feat_channels: channels of every feature level, G * C.
        num_heads: self-attention heads.
        ffn_channels: hidden size of the FFN.
        num_groups: G, sampling groups.
        in_points, out_points: P_in and P_out.
        num_cls_fcs, num_reg_fcs: hidden layers of the two heads.
        own_generator, own_out_proj: see :class:`AdaptiveMixing`; the decoder sets them.

    Raises:
        UserError: ``feat_channels`` not divisible by ``num_groups``, ``content_dim`` not divisible by
            ``num_heads`` or by 8.
    """

    def __init__(
        self,
        num_classes: int,
        content_dim: int = 256,
        feat_channels: int = 256,
        num_heads: int = 8,
        ffn_channels: int = 2048,
        num_groups: int = 4,
        in_points: int = 32,
        out_points: int = 128,
        num_cls_fcs: int = 1,
        num_reg_fcs: int = 1,
        own_generator: bool = True,
        own_out_proj: bool = True,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if feat_channels % num_groups:
            raise UserError(f"stage.feat_channels {feat_channels} is not divisible by num_groups {num_groups}")
        if content_dim % num_heads:
            raise UserError(f"stage.content_dim {content_dim} is not divisible by num_heads {num_heads}")
        if content_dim % 8:
            raise UserError(f"stage.content_dim {content_dim} is not divisible by 8, which the position encoding needs")
        self.feat_channels = feat_channels
        self.attention = QuerySelfAttention(content_dim, num_heads)
        self.attention_norm = nn.LayerNorm(content_dim)
        self.sampling = AdaptiveSampling(content_dim, num_groups, in_points)
        self.mixing = AdaptiveMixing(
            content_dim, feat_channels, num_groups, in_points, out_points, own_generator, own_out_proj
        )
        self.ffn = FFN(content_dim, ffn_channels)
        self.ffn_norm = nn.LayerNorm(content_dim)
        self.cls_branch = branch(content_dim, num_cls_fcs, num_classes)
        self.reg_branch = branch(content_dim, num_reg_fcs, 4)

    def init_weights(self) -> None:
        """Every Linear Xavier-uniform with PyTorch's default bias; then the parts that start elsewhere."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(self.attention.in_proj_weight)
        nn.init.zeros_(self.attention.in_proj_bias)
        nn.init.uniform_(self.attention.tau, 0, 4)
        self.sampling.init_weights()
        if self.mixing.parameter_generator is not None:
            self.mixing.parameter_generator.reset_parameters()
        nn.init.constant_(self.cls_branch[-1].get_parameter("bias"), bias_init_with_prob(0.01))
        for parameter in self.reg_branch[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        pyramid: Pyramid,
        xyzr: Tensor,
        content: Tensor,
        generate: Generator | None = None,
        project: Projection | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine the queries once.

        Args:
            pyramid: feature levels as :func:`arrange` returns them.
            xyzr: positions (B, N, 4), detached.
            content: (B, N, d).
            generate, project: where M, S and W_out come from; see :class:`AdaptiveMixing`.

        Returns:
            Class logits (B, N, num_classes), refined positions (B, N, 4), content (B, N, d).
        """
        content = self.attention_norm(self.attention(content, xyzr))
        sampled = self.sampling(pyramid, content, xyzr)
        content = self.mixing(sampled, content, generate, project)
        content = self.ffn_norm(self.ffn(content))
        delta = full_precision(self.reg_branch, content)
        return full_precision(self.cls_branch, content), refine_xyzr(xyzr, delta), content
