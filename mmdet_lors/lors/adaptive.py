"""LORSA, the adaptive low-rank residual structure: weights that a stack of layers generates from queries."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocation import PerLayer, allocation
from .recompute import recompute
from .serving import Servable

Shape = tuple[int, int]
Block = tuple[Tensor, Tensor]
"""One shape's part of a generator: weight (copies, rows * cols, query_dim) and bias (copies, rows * cols)."""


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
        self.shapes, self.copies = [(rows, cols) for rows, cols in shapes], copies

    def reset_parameters(self) -> None:
        """Weight zero, PyTorch's default bias: at the start every query mixes with the same bias."""
        nn.init.zeros_(self.weight)
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, query: Tensor) -> list[Tensor]:  # type: ignore[override]  # split, unlike a Linear's
        """(..., query_dim) -> one (..., copies, rows, cols) per shape."""
        return split(super().forward(query), self.shapes, self.copies)

    def blocks(self) -> list[Block]:
        """Views of weight and bias, one block per shape."""
        sizes = [rows * cols for rows, cols in self.shapes]
        weights, biases = (p.unflatten(0, (self.copies, -1)).split(sizes, dim=1) for p in (self.weight, self.bias))
        return list(zip(weights, biases, strict=True))

    def extra_repr(self) -> str:
        return f"{self.in_features}, shapes={self.shapes}, copies={self.copies}"


def start_factors_(B: Tensor, A: Tensor, rank: int) -> None:
    """Fill B (..., rows, K * r) and A (..., K * r, cols), Kaiming-uniform, for an E between them that starts at zero.

    The fan is rows * r for B and r * cols for A (released code).
    """
    for factor, size in ((B, B.shape[-2]), (A, A.shape[-1])):
        bound = math.sqrt(6 / (size * rank))
        nn.init.uniform_(factor, -bound, bound)


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
        """E zero, so that a layer starts as the shared part alone; B and A Kaiming-uniform."""
        nn.init.zeros_(self.E.weight)
        nn.init.zeros_(self.E.bias)
        for B, A in zip(self.B, self.A, strict=True):
            start_factors_(B, A, self.rank)

    def forward(self, query: Tensor, shared: Sequence[Tensor] | None = None) -> list[Tensor]:
        """sum_k B E(q) A, added to ``shared`` if given. (..., query_dim) -> one (..., copies, rows, cols) per shape."""
        weights = []
        for s, (B, E, A) in enumerate(zip(self.B, self.E(query), self.A, strict=True)):
            E = E.unflatten(-3, (self.copies, self.groups))
            EA = (E @ A.unflatten(1, (self.groups, self.rank))).flatten(-3, -2)  # (..., copies, K * r, cols)
            if shared is None:
                weights.append(B @ EA)
                continue
            batch = EA.shape[:-2]
            weight = torch.baddbmm(shared[s].flatten(0, -3), B.expand(*batch, -1, -1).flatten(0, -3), EA.flatten(0, -3))
            weights.append(weight.unflatten(0, batch))
        return weights

    def fold(self, index: int, shared: Block | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one Linear that generates the matrices of shape ``index``, shared part and all.

        Every column of E's weight, and its bias, is a core of its own: between B and A it gives the matching column
        of the folded weight. The columns stay the last, contiguous dim.

        Args:
            index: which of the shapes.
            shared: that shape's part of the shared generator, see :meth:`AdaptiveWeights.blocks`.

        Returns:
            (copies * rows * cols, query_dim) and (copies * rows * cols,).
        """
        B, A = self.B[index], self.A[index].unflatten(1, (self.groups, self.rank)).flatten(0, 1)
        folded = []
        for cores, common in zip(self.E.blocks()[index], shared or (None, None), strict=True):
            E = cores.reshape(len(A), self.rank, self.rank, -1)  # (copies * K, r, r, columns)
            EA = A.mT.unsqueeze(1) @ E  # (copies * K, r, cols, columns)
            EA = EA.reshape(self.copies, self.groups * self.rank, -1)
            if common is None:
                folded.append(B @ EA)
            else:
                folded.append(torch.baddbmm(common.reshape(self.copies, B.shape[1], -1), B, EA))
        return folded[0].view(-1, self.E.in_features), folded[1].flatten()


class LORSA(Servable):
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
        path: how the private part is applied, both equal: 'weights' builds B E A for every query and adds it (released
            code); 'fold' adds the private part to the generator, once for all queries; 'auto' takes the cheaper one.

    Raises:
        ValueError: a list of the wrong length, a rank below 1, an unknown ``shared_init`` or ``path``, or a layer left
            without any weight.
    """

    SHARED_INITS = ("zeros", "kaiming")
    PATHS = ("auto", "weights", "fold")

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
        path: str = "auto",
    ) -> None:
        super().__init__()
        if shared_init not in self.SHARED_INITS:
            raise ValueError(f"shared_init must be one of {', '.join(self.SHARED_INITS)}, got {shared_init!r}")
        if path not in self.PATHS:
            raise ValueError(f"path must be one of {', '.join(self.PATHS)}, got {path!r}")
        self.shared_init, self.path = shared_init, path
        self.query_dim, self.num_layers = query_dim, num_layers
        self.shapes, self.copies = [(rows, cols) for rows, cols in shapes], copies
        self.shared = AdaptiveWeights(query_dim, shapes, copies) if shared else None
        self.private: Sequence[PrivateLORSA | None] = nn.ModuleList(  # type: ignore[assignment]  # has its methods
            PrivateLORSA(query_dim, shapes, copies, r, k) if k else None  # type: ignore[misc]  # and holds None, too
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

    def chosen_path(self, num_queries: int) -> str:
        """The path for this many queries on the device.

        B E A costs as much for a query as for a column of the folded generator, of which there are m + 1.
        """
        if self.path != "auto":
            return self.path
        return "fold" if num_queries > self.query_dim + 1 else "weights"

    def forward(self, query: Tensor, layer: int, folded: list[list[Block]] | None = None) -> list[Tensor]:
        """W_i(q) = W_shared(q) + sum_k B E(q) A. (..., query_dim) -> one (..., copies, rows, cols) per shape.

        Args:
            query: q.
            layer: i.
            folded: the ``layers`` of what :meth:`for_pass` returned, for a caller that goes through all layers.
        """
        folded = self.for_layer() if folded is None else folded
        if folded is not None:
            return [self._generate(query, s, None, linear) for s, linear in enumerate(folded[layer])]
        private = self.private[layer]
        if private is not None and self.chosen_path(math.prod(query.shape[:-1])) == "fold":
            sizes = [self.query_dim * self.copies * rows * cols for rows, cols in self.shapes]
            return [
                recompute(self._generate, query, s, private, block, instead_of=sizes[s])
                for s, block in enumerate(self._blocks())
            ]
        if private is not None:
            return private(query, None if self.shared is None else self.shared(query))
        assert self.shared is not None
        return self.shared(query)

    def _generate(self, query: Tensor, index: int, private: PrivateLORSA | None, block: Block | None) -> Tensor:
        """One shape of W_i(q) as what it is, affine in q: by one Linear, into which a private part is folded first."""
        if private is not None:
            block = private.fold(index, block)
        assert block is not None  # see allocation(): a layer has a private part, the shared one, or both
        return F.linear(query, *block).unflatten(-1, (self.copies, *self.shapes[index]))

    def _blocks(self) -> list[Block] | list[None]:
        return [None] * len(self.shapes) if self.shared is None else self.shared.blocks()

    def fold_for_serving(self, layer: int) -> list[Block]:
        """One Linear per shape: what it generates need not be split."""
        private = self.private[layer]
        if private is None:
            assert self.shared is not None
            return [(weight.flatten(0, 1), bias.flatten()) for weight, bias in self.shared.blocks()]
        return [private.fold(s, block) for s, block in enumerate(self._blocks())]

    def fold(self, layer: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one AdaptiveWeights that generates what layer i does: W_i(q) is affine in q.

        (copies * sum(rows * cols), query_dim) and (copies * sum(rows * cols),).
        """
        if self.private[layer] is None:
            assert self.shared is not None
            return self.shared.weight, self.shared.bias
        parts = zip(*self.fold_for_serving(layer), strict=True)
        weight, bias = (
            torch.cat([p.unflatten(0, (self.copies, -1)) for p in part], dim=1).flatten(0, 1) for part in parts
        )
        return weight, bias
