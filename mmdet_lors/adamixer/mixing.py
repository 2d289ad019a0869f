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
    """ACM before its norm and ReLU: X M. x (..., P_in, C), M (..., C, C)."""
    return x @ M


def adaptive_spatial_mixing(x: Tensor, S: Tensor) -> Tensor:
    """ACM's norm and ReLU, then ASM before its own: S ReLU(LN(x)). x (..., P_in, C) -> (..., P_out, C)."""
    return S @ norm_relu(x)


def project_out(x: Tensor, project: Projection) -> Tensor:
    """ASM's norm and ReLU, then W_out flatten(ReLU(LN(x))). x (B, N, G, P_out, C) -> (B, N, d)."""
    return project(norm_relu(x).flatten(2))


class AdaptiveMixing(nn.Module):
    """q <- LN(q + W_out flatten(ASM(ACM(x)))), with M and S generated from q.

    ACM(X) = ReLU(LN(X M)) and ASM(X) = ReLU(LN(S X)). The three steps below are cut before each norm: a norm and its
    ReLU cost little next to the products, so that the backward pass computes them again instead of keeping them, where
    there are more queries than content dims; with fewer, the generator outweighs what it generates.

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
        M, S = generate(query)
        x = adaptive_channel_mixing(x, M)
        if torch.is_grad_enabled() and query.shape[:2].numel() > query.shape[-1]:
            x = recompute(adaptive_spatial_mixing, x, S)
            x = recompute(project_out, x, project)
        else:
            x = project_out(adaptive_spatial_mixing(x, S), project)
        return self.norm(query + x)
