"""LORSA: the adaptive low-rank residual structure, for weights that a stack of layers generates from queries."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocation import PerLayer, allocation

Shape = tuple[int, int]


def split(flat: Tensor, shapes: Sequence[Shape], copies: int) -> list[Tensor]:
    """What one Linear generates, (..., copies * sum(rows * cols)) -> one (..., copies, rows, cols) per shape."""
    parts = flat.unflatten(-1, (copies, -1)).split([rows * cols for rows, cols in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


class AdaptiveWeights(nn.Linear):
    r"""Matrices generated from a query, :math:`W(q) = \mathrm{reshape}(\mathrm{Linear}(q))`.

    One Linear makes ``copies`` sets of matrices; a set holds one matrix per entry of ``shapes``, in that order.
    This is AdaMixer's parameter generator, and both halves of LORSA are made of it.

    Args:
        query_dim: m, the query's size.
        shapes: (rows, cols) of each matrix of a set.
        copies: number of sets.
    """

    def __init__(self, query_dim: int, shapes: Sequence[Shape], copies: int) -> None:
        super().__init__(query_dim, copies * sum(rows * cols for rows, cols in shapes))
        self.shapes, self.copies = [tuple(s) for s in shapes], copies

    def reset_parameters(self) -> None:
        """Weight zero, PyTorch's default bias: at the start every query mixes with the same bias."""
        nn.init.zeros_(self.weight)
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, query: Tensor) -> list[Tensor]:
        """(..., query_dim) -> one (..., copies, rows, cols) per shape."""
        return split(super().forward(query), self.shapes, self.copies)

    def extra_repr(self) -> str:
        return f"{self.in_features}, shapes={self.shapes}, copies={self.copies}"


class PrivateLORSA(nn.Module):
    r"""One layer's private part, :math:`\Delta W(q) = \sum_{k=1}^{K} B^k E^k(q) A^k`, for every copy and shape.

    Only the small core E(q), r x r, is generated; B (rows x r) and A (r x cols) are ordinary parameters, with
    the K of them side by side: B is (copies, rows, K * r), A is (copies, K * r, cols).

    Args:
        query_dim: m.
        shapes, copies: as in :class:`AdaptiveWeights`; every copy has its own B, A and E.
        rank, groups: r and K.
    """

    def __init__(self, query_dim: int, shapes: Sequence[Shape], copies: int, rank: int, groups: int) -> None:
        super().__init__()
        self.rank, self.groups, self.copies = rank, groups, copies
        self.E = AdaptiveWeights(query_dim, [(rank, rank)] * len(shapes), copies * groups)
        self.B = nn.ParameterList(torch.empty(copies, rows, groups * rank) for rows, _ in shapes)
        self.A = nn.ParameterList(torch.empty(copies, groups * rank, cols) for _, cols in shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E zero, so that a layer starts as the shared part alone; B and A Kaiming-uniform.

        The fan is rows * r for B and r * cols for A (released code).
        """
        nn.init.zeros_(self.E.weight)
        nn.init.zeros_(self.E.bias)
        for B, A in zip(self.B, self.A, strict=True):
            bound_B, bound_A = (math.sqrt(6 / (size * self.rank)) for size in (B.shape[1], A.shape[2]))
            nn.init.uniform_(B, -bound_B, bound_B)
            nn.init.uniform_(A, -bound_A, bound_A)

    def compose(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Cores E, one (n, copies * K, r, r) per shape -> sum_k B E A, one (n, copies, rows, cols) per shape."""
        weights = []
        for B, E, A in zip(self.B, cores, self.A, strict=True):
            B = B.unflatten(-1, (self.groups, self.rank))
            E = E.unflatten(1, (self.copies, self.groups))
            BE = torch.einsum("gikr,ngkrs->ngiks", B, E).flatten(-2)
            weights.append(torch.einsum("ngip,gpj->ngij", BE, A))
        return weights

    def forward(self, query: Tensor) -> list[Tensor]:
        """(n, query_dim) -> one (n, copies, rows, cols) per shape."""
        return self.compose(self.E(query))


class LORSA(nn.Module):
    r"""Query-generated weights for each of S stacked layers that share most of the generator.

    .. math:: W_i(q) = W^{shared}(q) + \sum_{k=1}^{K_i} B_i^k\, E_i^k(q)\, A_i^k

    :math:`W^{shared}(q) = \mathrm{reshape}(\mathrm{Linear}(q))`, one Linear for the stack;
    :math:`E_i^k(q) = \mathrm{reshape}(\mathrm{Linear}_i(q)) \in R^{r_i \times r_i}`, private;
    :math:`B_i^k \in R^{rows \times r_i}` and :math:`A_i^k \in R^{r_i \times cols}`, private, not generated.
    Source: LORS paper, equations 9 to 12.

    Args:
        query_dim: m.
        shapes: (rows, cols) of each weight that a query generates; AdaMixer needs M and S.
        copies: sets of weights per query; AdaMixer's sampling groups.
        num_layers: S.
        rank: r, one for all layers or one per layer.
        groups: K, one for all layers or one per layer; 0 gives a layer the shared part alone.
        shared: ``False`` drops the shared generator (the ablation "private only").
        shared_init: 'zeros' or 'kaiming' for the shared generator's weight. The paper says Kaiming, the code
            that produced its numbers starts from zero; the default follows the code.

    Raises:
        ValueError: a list of the wrong length, a rank below 1, an unknown ``shared_init``, or a layer left
            without any weight.
    """

    SHARED_INITS = ("zeros", "kaiming")

    def __init__(
        self,
        query_dim: int,
        shapes: Sequence[Shape],
        copies: int,
        num_layers: int,
        rank: PerLayer = 16,
        groups: PerLayer = 1,
        shared: bool = True,
        shared_init: str = "zeros",
    ) -> None:
        super().__init__()
        if shared_init not in self.SHARED_INITS:
            raise ValueError(f"shared_init must be one of {', '.join(self.SHARED_INITS)}, got {shared_init!r}")
        self.shared_init, self.shapes, self.copies = shared_init, [tuple(s) for s in shapes], copies
        self.shared = AdaptiveWeights(query_dim, shapes, copies) if shared else None
        self.private = nn.ModuleList(
            PrivateLORSA(query_dim, shapes, copies, r, k) if k else None
            for r, k in allocation(rank, groups, num_layers, shared)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the released code does, or with the paper's Kaiming shared generator.

        Without a shared part a zero core would stay zero for ever (its LayerNorm and ReLU pass no gradient),
        so E then starts as the shared generator otherwise does: weight zero, PyTorch's default bias.
        """
        if self.shared is not None:
            self.shared.reset_parameters()
            if self.shared_init == "kaiming":
                nn.init.kaiming_uniform_(self.shared.weight)
        for private in self.private:
            if private is not None:
                private.reset_parameters()
                if self.shared is None:
                    private.E.reset_parameters()

    def forward(self, query: Tensor, layer: int) -> list[Tensor]:
        """W_i(q). (..., query_dim) -> one (..., copies, rows, cols) per shape.

        B E A costs the same for a query as for a column of the folded generator, of which there are m + 1: with more
        queries than that, training folds first.
        """
        lead, query = query.shape[:-1], query.flatten(0, -2)
        private = self.private[layer]
        if private is None:
            weights = self.shared(query)
        elif self.training and len(query) > query.shape[1] + 1:
            weights = split(F.linear(query, *self.fold(layer)), self.shapes, self.copies)
        elif self.shared is None:
            weights = private(query)
        else:
            weights = [w + d for w, d in zip(self.shared(query), private(query), strict=True)]
        return [w.unflatten(0, lead) for w in weights]

    def fold(self, layer: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one Linear that generates W_i: W_i(q) is affine in q, hence so is its sum.

        Every column of E_i's weight, and its bias, is a core of its own: composing it with B and A gives the
        matching column of the folded weight. (copies * sum(rows * cols), query_dim) and (copies * sum(rows * cols),).
        """
        private = self.private[layer]
        if private is None:
            return self.shared.weight, self.shared.bias
        columns = torch.cat([private.E.weight.T, private.E.bias[None]])
        composed = private.compose(split(columns, private.E.shapes, private.E.copies))
        flat = torch.cat([w.flatten(-2) for w in composed], dim=-1).flatten(-2)
        weight, bias = flat[:-1].T, flat[-1]
        if self.shared is None:
            return weight, bias
        return self.shared.weight + weight, self.shared.bias + bias
