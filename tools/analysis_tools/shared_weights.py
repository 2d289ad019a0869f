"""What show_lors.py measures: energies, singular values and similarities of every weight that LORS shares."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdet_lors.errors import UserError
from mmdet_lors.lors import LORSA, LORST
from mmdet_lors.lors.stack import StackedWeight
from mmdet_lors.lors.stacked_adaptive import AdaptiveStackedWeight
from mmdet_lors.lors.static import PrivateLORST

ADAPTIVE_NAMES = ("M, channel mixing (LORSA)", "S, spatial mixing (LORSA)")
"""AdaMixer's two generated weights, in the order of LORSA's shapes."""
CHUNK = 1 << 20


@dataclass
class SharedWeightReport:
    """One weight that S stages share."""

    name: str
    unit: str
    """What the weight belongs to: 'stage' or 'layer'."""
    ranks: list[int]
    """K_i * r_i."""
    grams: dict[str, Tensor]
    """Per kind of energy ('constant' and 'of the query' for LORSA, 'static' otherwise): inner products of W_shared,
    P_1, ..., P_S, (S + 1, S + 1), float64."""
    singular_values: list[Tensor]
    """Of each P_i, K_i * r_i or fewer, largest first."""

    @property
    def gram(self) -> Tensor:
        """All kinds together."""
        return sum(self.grams.values())

    @property
    def shared(self) -> float:
        """|W_shared|^2."""
        return self.gram[0, 0].item()

    def private(self, stage: int) -> float:
        """|P_i|^2."""
        return self.gram[stage + 1, stage + 1].item()

    def cross(self, stage: int) -> float:
        """2 <W_shared, P_i>."""
        return 2 * self.gram[0, stage + 1].item()

    def total(self, stage: int) -> float:
        """|W_i|^2."""
        return self.shared + self.private(stage) + self.cross(stage)

    def private_share(self, stage: int) -> float:
        """|P_i|^2 / (|W_shared|^2 + |P_i|^2), 0 for a weight that is zero."""
        both = self.shared + self.private(stage)
        return self.private(stage) / both if both else 0.0

    @property
    def similarity(self) -> Tensor:
        """cos(W_i, W_j), (S, S); nan beside a weight that is zero."""
        gram = self.gram
        effective = gram[0, 0] + gram[0, 1:, None] + gram[0, 1:] + gram[1:, 1:]
        norm = effective.diagonal().clamp(min=0).sqrt()
        return effective / norm[:, None] / norm

    def as_dict(self) -> dict:
        """Every number, for JSON."""
        stages = []
        for i, rank in enumerate(self.ranks):
            stages.append(
                dict(
                    rank=rank,
                    shared=self.shared,
                    private=self.private(i),
                    cross=self.cross(i),
                    total=self.total(i),
                    private_share=self.private_share(i),
                    kinds={
                        kind: dict(shared=gram[0, 0].item(), private=gram[i + 1, i + 1].item())
                        for kind, gram in self.grams.items()
                    },
                    singular_values=self.singular_values[i].tolist(),
                )
            )
        # JSON has no nan.
        similarity = [[None if value != value else value for value in row] for row in self.similarity.tolist()]
        return dict(name=self.name, unit=self.unit, stages=stages, similarity=similarity)


def inner_products(tensors: Sequence[Tensor | None]) -> Tensor:
    """All <X_a, X_b> of n tensors of one size, (n, n), summed in float64; None is zero."""
    size = next(t.numel() for t in tensors if t is not None)
    flat = [None if t is None else t.flatten() for t in tensors]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for first in range(0, size, CHUNK):
        length = min(CHUNK, size - first)
        chunk = torch.zeros(len(flat), length, dtype=torch.float64)
        for row, values in zip(chunk, flat, strict=True):
            if values is not None:
                row.copy_(values[first : first + length])
        gram += chunk @ chunk.T
    return gram


def low_rank_singular_values(private: PrivateLORST | None) -> Tensor:
    """Singular values of B A, from the triangular factors of B and A^T, in float64."""
    if private is None:
        return torch.zeros(0, dtype=torch.float64)
    left, right = (torch.linalg.qr(factor.double()).R for factor in (private.B, private.A.T))
    return torch.linalg.svdvals(left @ right.T)


def row_singular_values(weight: Tensor, bias: Tensor, copies: int, rows: int, rank: int) -> Tensor:
    """Of what a generator makes, its rows against columns and query together, squares added over the copies.

    Args:
        weight, bias: (copies * rows * cols, m) and (copies * rows * cols,).
        copies, rows: as in LORSA.
        rank: K * r; beyond it all are zero.
    """
    squares = 0
    for columns, constant in zip(weight.chunk(copies), bias.chunk(copies), strict=True):
        matrix = torch.cat([columns.reshape(rows, -1), constant.reshape(rows, -1)], dim=1).double()
        squares = squares + torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp(min=0)
    return squares.sqrt()[:rank]


def report_lorsa(lorsa: LORSA) -> Iterator[SharedWeightReport]:
    """One report for each matrix that LORSA generates."""
    for s, (rows, _) in enumerate(lorsa.shapes):
        shared = (None, None) if lorsa.shared is None else lorsa.shared.blocks()[s]
        private = [(None, None) if p is None else p.fold(s, None) for p in lorsa.private]
        ranks = [0 if p is None else p.groups * p.rank for p in lorsa.private]
        singular = [
            torch.zeros(0, dtype=torch.float64) if p[0] is None else row_singular_values(*p, lorsa.copies, rows, rank)
            for p, rank in zip(private, ranks, strict=True)
        ]
        of_query, constant = (inner_products(part) for part in zip(shared, *private, strict=True))
        name = ADAPTIVE_NAMES[s] if len(lorsa.shapes) == len(ADAPTIVE_NAMES) else f"generated weight {s} (LORSA)"
        yield SharedWeightReport(name, "stage", ranks, {"constant": constant, "of the query": of_query}, singular)


def report_static(
    name: str, unit: str, shared: Tensor | None, private: Sequence[PrivateLORST | None]
) -> SharedWeightReport:
    """The report of a weight W_i = W_shared + B_i A_i."""
    products = [None if p is None else p.B @ p.A for p in private]
    ranks = [0 if p is None else len(p.A) for p in private]
    singular = [low_rank_singular_values(p) for p in private]
    return SharedWeightReport(name, unit, ranks, {"static": inner_products([shared, *products])}, singular)


def _stack_name(paths: Sequence[str]) -> str:
    """Where the weights of a stack are, with * where the paths differ."""
    parts = zip(*(path.removesuffix("_lorst").split(".") for path in paths), strict=True)
    return ".".join(found.pop() if len(found := set(part)) == 1 else "*" for part in parts)


@torch.no_grad()
def reports(model: nn.Module) -> list[SharedWeightReport]:
    """Every weight in the model that LORS shares; empty for a model without LORS.

    Raises:
        UserError: a stack is adaptive.
    """
    found: list[SharedWeightReport] = []
    stacks: dict[int, list[tuple[str, StackedWeight]]] = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(module, LORSA):
            found += report_lorsa(module)
        elif isinstance(module, LORST):
            found.append(report_static("W_out, output projection (LORST)", "stage", module.shared, module.private))
        elif isinstance(module, AdaptiveStackedWeight):
            raise UserError(f"{path}: adaptive weights depend on the input: there is no weight to measure")
        elif isinstance(module, StackedWeight):
            stacks[id(module.first)].append((path, module))
    for members in stacks.values():
        members.sort(key=lambda member: member[1].position)
        paths, weights = zip(*members, strict=True)
        private = [weight.private for weight in weights]
        found.append(report_static(_stack_name(paths), "layer", weights[0].first.shared, private))
    return found
