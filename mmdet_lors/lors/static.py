"""LORST, the static low-rank residual structure: weights of a stack of layers that share one."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocation import PerLayer, allocation
from .serving import Servable


class PrivateLORST(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        """(x A^T) B^T, without forming B A. (..., in_features) -> (..., out_features)."""
        return F.linear(F.linear(x, self.A), self.B)


class LORST(Servable):
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
        path: how the private part is applied, both equal: 'features' computes (x A^T) B^T, 'fold' adds B A to the
            shared weight; 'auto' takes the cheaper one.

    Raises:
        ValueError: a list of the wrong length, a rank below 1, an unknown ``path``, or a layer left without any weight.
    """

    PATHS = ("auto", "features", "fold")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_layers: int,
        rank: PerLayer = 8,
        groups: PerLayer = 1,
        shared: bool = True,
        bias: bool = True,
        path: str = "auto",
    ) -> None:
        super().__init__()
        if path not in self.PATHS:
            raise ValueError(f"path must be one of {', '.join(self.PATHS)}, got {path!r}")
        self.path = path
        self.in_features, self.out_features, self.num_layers = in_features, out_features, num_layers
        self.shared = nn.Parameter(torch.empty(out_features, in_features)) if shared else None
        self.private: Sequence[PrivateLORST | None] = nn.ModuleList(  # type: ignore[assignment]  # has its methods
            PrivateLORST(in_features, out_features, r * k) if k else None  # type: ignore[misc]  # and holds None, too
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

    def chosen_path(self, num_inputs: int) -> str:
        """The path for this many rows of x.

        B A costs out * in multiply-adds per unit of rank, whatever comes in; (x A^T) B^T costs in + out per row.
        """
        if self.path != "auto":
            return self.path
        break_even = self.in_features * self.out_features / (self.in_features + self.out_features)
        return "fold" if num_inputs > break_even else "features"

    def fold(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_i and b_i: the plain Linear that layer i is equal to."""
        private = self.private[layer]
        if self.shared is None:
            assert private is not None
            weight = private.B @ private.A
        elif private is None:
            weight = self.shared
        else:
            weight = torch.addmm(self.shared, private.B, private.A)
        return weight, self.bias[layer] if self.bias is not None else None

    def forward(self, x: Tensor, layer: int, folded: list | None = None) -> Tensor:
        """x W_i^T + b_i. (..., in_features) -> (..., out_features).

        Args:
            x: the layer's input.
            layer: i.
            folded: the ``layers`` of what :meth:`for_pass` returned, for a caller that goes through all layers.
        """
        folded = self.for_layer() if folded is None else folded
        if folded is not None:
            return F.linear(x, *folded[layer])
        private, bias = self.private[layer], self.bias[layer] if self.bias is not None else None
        if private is None or self.chosen_path(math.prod(x.shape[:-1])) == "fold":
            return F.linear(x, *self.fold(layer))
        residual = private(x)
        if self.shared is None:
            return residual if bias is None else residual + bias
        return F.linear(x, self.shared, bias) + residual

    def extra_repr(self) -> str:
        shared = self.shared is not None
        return f"{self.in_features}, {self.out_features}, num_layers={self.num_layers}, shared={shared}"
