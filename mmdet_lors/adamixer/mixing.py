"""Adaptive mixing: adaptive channel mixing (ACM), adaptive spatial mixing (ASM), and the output projection."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_lors.lors import AdaptiveWeights
from mmdet_lors.lors.recompute import recompute

Generator = Callable[[Tensor], list[Tensor]]
Projection = Callable[[Tensor], Tensor]


def norm_relu(x: Tensor) -> Tensor:
    """ReLU(LN(x)); the LayerNorm spans the last two dims together and has no affine part."""
    return F.relu(F.layer_norm(x, x.shape[-2:]), inplace=True)


def adaptive_channel_mixing(x: Tensor, M: Tensor) -> Tensor:
    """ACM(X) = ReLU(LN(X M)). x (..., P_in, C), M (..., C, C) -> (..., P_in, C)."""
    return norm_relu(x @ M)


def adaptive_spatial_mixing(x: Tensor, S: Tensor) -> Tensor:
    """ASM(X) = ReLU(LN(S X)). x (..., P_in, C), S (..., P_out, P_in) -> (..., P_out, C)."""
    return norm_relu(S @ x)


def mix(x: Tensor, M: Tensor, S: Tensor, project: Projection) -> Tensor:
    """W_out flatten(ASM(ACM(X))). x (B, N, G, P_in, C) -> (B, N, d)."""
    return project(adaptive_spatial_mixing(adaptive_channel_mixing(x, M), S).flatten(2))


def mix_in_less_memory(x: Tensor, M: Tensor, S: Tensor, project: Projection) -> Tensor:
    """:func:`mix`, cut before each norm: the backward pass computes norms and ReLUs again, and no product."""
    x = x @ M
    x = recompute(lambda x: S @ norm_relu(x), x, instead_of=x.numel())
    return recompute(lambda x: project(norm_relu(x).flatten(2)), x, instead_of=x.numel())


class AdaptiveMixing(nn.Module):
    """q <- LN(q + W_out flatten(ASM(ACM(X)))), with M and S generated from q.

    M, S and W_out are a stage's own, or come from the LORS modules of the whole stack: the mixing is the same.

    Args:
        content_dim: d.
        feat_channels: G * C.
        num_groups: G.
        in_points, out_points: P_in and P_out.
        own_generator, own_out_proj: whether this stage owns what makes M and S, and W_out; ``False`` where
            the stack provides them.
    """

    def __init__(
        self,
        content_dim: int,
        feat_channels: int,
        num_groups: int,
        in_points: int,
        out_points: int,
        own_generator: bool = True,
        own_out_proj: bool = True,
    ) -> None:
        super().__init__()
        channels = feat_channels // num_groups
        self.copies = num_groups
        self.shapes = [(channels, channels), (out_points, in_points)]
        self.out_features = num_groups * out_points * channels
        self.parameter_generator = AdaptiveWeights(content_dim, self.shapes, num_groups) if own_generator else None
        self.out_proj = nn.Linear(self.out_features, content_dim) if own_out_proj else None
        self.norm = nn.LayerNorm(content_dim)

    def forward(
        self, x: Tensor, query: Tensor, generate: Generator | None = None, project: Projection | None = None
    ) -> Tensor:
        """Mix the sampled features into the query.

        Args:
            x: sampled features (B, N, G, P_in, C).
            query: content (B, N, d).
            generate: query -> [M, S], each (B, N, G, ...); this stage's own by default.
            project: (B, N, G * P_out * C) -> (B, N, d); this stage's own by default.

        Returns:
            The new content (B, N, d).
        """
        generate = self.parameter_generator if generate is None else generate
        project = self.out_proj if project is None else project
        assert generate is not None and project is not None  # the stage's own, or the stack's
        M, S = generate(query)
        # With fewer queries than content dims, the generator outweighs what it generates.
        many = torch.is_grad_enabled() and query.shape[:2].numel() > query.shape[-1]
        return self.norm(query + (mix_in_less_memory if many else mix)(x, M, S, project))
