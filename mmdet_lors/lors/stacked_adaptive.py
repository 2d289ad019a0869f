"""LORSA for the Linears of a stack: a low-rank part of the weight that the layer's input generates."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adaptive import AdaptiveWeights, start_factors_
from .computed import ComputedWeightError, ComputesWeights
from .stacked import StackedWeight
from .static import LORST

CONDITIONS = ("token", "mean")


class AdaptiveResidual(nn.Module):
    r"""One layer's private part, applied: :math:`\sum_{k=1}^{K} B^k E^k(h) A^k x`.

    :math:`E^k(h) = \mathrm{reshape}(\mathrm{Linear}(h)) \in R^{r \times r}` is generated; :math:`B^k \in R^{out \times
    r}` and :math:`A^k \in R^{r \times in}` are ordinary parameters, side by side: B is (out, K * r), A is (K * r, in).
    Source: LORS paper, equations 11 and 12, with what appendix A.2 proposes for Transformers: h is the layer's input
    in place of a detector's query.

    A token costs (in + out) * K * r + (in + 1) * K * r^2 multiply-adds; no (out, in) matrix is formed for it.

    Args:
        in_features, out_features: the weight is (out_features, in_features).
        rank, groups: r and K.
        condition: what h is. 'token': x itself, for each token. 'mean': the mean of x over all dims between the first,
            which is the batch, and the channels: one h for an image of (B, N, C) or (B, H, W, C), class token and
            padding included. An input of (B, C) has one token.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, groups: int, condition: str) -> None:
        super().__init__()
        self.rank, self.groups, self.condition = rank, groups, condition
        self.A = nn.Parameter(torch.empty(groups * rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, groups * rank))
        self.E = AdaptiveWeights(in_features, [(rank, rank)], groups)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As LORSA: E zero, so that a layer starts as W_shared alone; B and A Kaiming-uniform."""
        nn.init.zeros_(self.E.weight)
        nn.init.zeros_(self.E.bias)
        start_factors_(self.B, self.A, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        alone = self.condition == "token" or x.dim() < 3
        # (b, n, in): n tokens have one h.
        tokens = x.reshape(-1, 1, x.shape[-1]) if alone else x.flatten(1, -2)
        (E,) = self.E(tokens[:, 0] if alone else tokens.mean(1))
        Ax = F.linear(tokens, self.A).unflatten(-1, (self.groups, self.rank))
        EAx = torch.einsum("bkpq,bnkq->bnkp", E, Ax).flatten(-2)
        return F.linear(EAx, self.B).view(*x.shape[:-1], len(self.B))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, groups={self.groups}, condition={self.condition}"


class AdaptiveLinear(ComputesWeights):
    r"""A Linear with an adaptive weight: :math:`y = W^{shared} x + b + \sum_k B^k E^k(h) A^k x`.

    Source: see :class:`AdaptiveResidual`. Reading its ``weight`` is an error: there is none without an input.
    """

    remedy = "weight depends on the layer's input, W_shared + B E(h) A: call the layer; write to weight_lorst"
    weight_lorst: "AdaptiveStackedWeight"
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight_lorst.first.shared, self.bias) + self.weight_lorst.private(x)


class AdaptiveStackedWeight(StackedWeight):
    r"""One layer's part of an adaptive stack: W_shared, see :class:`StackedWeight`, and its :class:`AdaptiveResidual`.

    Args:
        lorst: where W_shared is taken from.
        position, first, init, turns: see :class:`StackedWeight`.
        rank, groups: r and K, at least 1.
        condition: see :class:`AdaptiveResidual`.
    """

    private: AdaptiveResidual  # type: ignore[assignment]  # a static weight's is another
    layer_base = AdaptiveLinear

    def __init__(
        self,
        lorst: LORST,
        position: int,
        first: StackedWeight | None,
        init: str,
        turns: int,
        rank: int,
        groups: int,
        condition: str,
    ) -> None:
        super().__init__(lorst, position, first, init, turns)
        self.private = AdaptiveResidual(lorst.in_features, lorst.out_features, rank, groups, condition)
        self.private.to(self.first.shared)

    def plain(self) -> Tensor:
        """W_shared, (out, in): what the layer starts as."""
        return self.first.shared

    def forward(self) -> Tensor:
        """Refuse: the weight is another for every input."""
        raise ComputedWeightError(AdaptiveLinear.remedy)
