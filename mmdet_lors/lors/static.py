"""LORST: the static low-rank residual structure, one ordinary weight for a whole stack of layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocation import PerLayer, allocation


class LowRankResidual(nn.Module):
    r"""The private part of one layer's weight, :math:`\Delta W = \sum_{k=1}^{K} B^k A^k`.

    The K groups of rank r are kept side by side as one pair of rank K*r, which is the same sum.

    Args:
        in_features, out_features: the weight is (out_features, in_features).
        rank: K * r.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero: a layer starts as the shared weight alone (LORS paper, 4.1)."""
        nn.init.kaiming_uniform_(self.A)
        nn.init.zeros_(self.B)

    def weight(self) -> Tensor:
        """B A, (out_features, in_features)."""
        return self.B @ self.A

    def forward(self, x: Tensor) -> Tensor:
        """(x A^T) B^T, without forming B A. (..., in_features) -> (..., out_features)."""
        return F.linear(F.linear(x, self.A), self.B)


class LORST(nn.Module):
    r"""A linear map for each of S stacked layers that share most of their weight.

    .. math:: W_i = W^{shared} + \sum_{k=1}^{K_i} B_i^k A_i^k, \qquad y = x W_i^T + b_i

    :math:`W^{shared}, W_i \in R^{out \times in}`; :math:`B_i^k \in R^{out \times r_i}`;
    :math:`A_i^k \in R^{r_i \times in}`. A, B and the bias belong to layer i.
    Source: LORS paper, equations 7 and 8.

    Args:
        in_features, out_features: size of the map.
        num_layers: S.
        rank: r, one for all layers or one per layer.
        groups: K, one for all layers or one per layer; 0 gives a layer the shared weight alone.
        shared: ``False`` drops W_shared (the ablation "private only").
        bias: whether each layer has a bias of its own.

    Raises:
        ValueError: a list of the wrong length, a rank below 1, or a layer left without any weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_layers: int,
        rank: PerLayer = 8,
        groups: PerLayer = 1,
        shared: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_layers = in_features, out_features, num_layers
        self.shared = nn.Parameter(torch.empty(out_features, in_features)) if shared else None
        self.private = nn.ModuleList(
            LowRankResidual(in_features, out_features, r * k) if k else None
            for r, k in allocation(rank, groups, num_layers, shared)
        )
        self.bias = nn.ParameterList(torch.empty(out_features) for _ in range(num_layers)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_shared as PyTorch initialises a Linear, A Kaiming-uniform, B and biases zero (released code)."""
        if self.shared is not None:
            nn.init.kaiming_uniform_(self.shared, a=5**0.5)
        for private in self.private:
            if private is not None:
                private.reset_parameters()
        for bias in self.bias or ():
            nn.init.zeros_(bias)

    def fold(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_i and b_i: the plain Linear that layer i is equal to."""
        private = self.private[layer]
        if private is None:
            weight = self.shared
        elif self.shared is None:
            weight = private.weight()
        else:
            weight = self.shared + private.weight()
        return weight, self.bias[layer] if self.bias is not None else None

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """x W_i^T + b_i. (..., in_features) -> (..., out_features)."""
        private, bias = self.private[layer], self.bias[layer] if self.bias is not None else None
        if private is None:
            return F.linear(x, self.shared, bias)
        if self.shared is None:
            out = private(x)
            return out if bias is None else out + bias
        return F.linear(x, self.shared, bias) + private(x)

    def extra_repr(self) -> str:
        shared = self.shared is not None
        return f"{self.in_features}, {self.out_features}, num_layers={self.num_layers}, shared={shared}"
