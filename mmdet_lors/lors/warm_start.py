"""Warm start: LORS weights that come as near as possible to the weights of a trained plain stack.

Both fits minimise the squared (Frobenius) distance to all layers' weights together, by turns: the shared part becomes
the mean of what the private parts leave over, each private part the best low-rank fit to what the shared part leaves
over. Every step solves its own least-squares problem, so the error never grows. The first turn is the plain "mean plus
truncated SVD"; the later ones matter: where the weights really are of LORS form, they alone find it.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .adaptive import LORSA
from .static import LORST


class FitError(NamedTuple):
    """Distances to one layer's plain weight, relative to that weight's norm."""

    mean: float
    """What the layers' mean alone would leave over, without any private part."""
    fitted: float
    """What the fit leaves over."""


class Group(NamedTuple):
    """One low-rank group of LORSA, n = m + 1 matrices B E_n A: one per entry of the query, and one for the bias."""

    B: Tensor
    """(rows, r), orthonormal columns."""
    E: Tensor
    """(r, r, n)."""
    A: Tensor
    """(r, cols), orthonormal rows."""


def leading_left(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors of (rows, n), from its Gram matrix; zero beyond min(rows, n)."""
    rows, columns = matrix.shape
    if rows > columns:
        basis, matrix = torch.linalg.qr(matrix)
        return basis @ leading_left(matrix, rank)
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(-1)[:, :rank]
    return torch.nn.functional.pad(vectors, (0, rank - vectors.shape[1]))


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """Of tensors of one shape."""
    return sum(tensors[1:], tensors[0]) / len(tensors)


def _relative(error: Tensor, weight: Tensor) -> float:
    norm = weight.norm()
    return (error.norm() / norm).item() if norm else error.norm().item()


def fit_static(
    weights: Sequence[Tensor], ranks: Sequence[int], shared: bool = True, turns: int = 20
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]], list[float]]:
    r"""Minimise :math:`\sum_i \|W_i - W^{shared} - B_i A_i\|_F^2`.

    Args:
        weights: W_i, (out, in) each.
        ranks: K_i * r_i; 0 for a layer without a private part.
        shared: ``False`` leaves W_shared out.
        turns: how often shared and private parts are refitted in turn.

    Returns:
        W_shared; (B_i, A_i) per layer, B_i (out, rank) with orthonormal columns; the sum of squares after every turn.
    """
    common = torch.zeros_like(weights[0], dtype=torch.float64)
    pairs = [(w.new_zeros(len(w), 0).double(), w.new_zeros(0, w.shape[1]).double()) for w in weights]
    history = []
    for _ in range(turns if shared else 1):
        if shared:
            common = mean_of([w.double() - B @ A for w, (B, A) in zip(weights, pairs, strict=True)])
        error = 0.0
        for i, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
            rest = weight.double() - common
            B = leading_left(rest, rank)
            pairs[i] = B, B.T @ rest
            error += (rest - B @ pairs[i][1]).square().sum().item()
        history.append(error)
    return common if shared else None, pairs, history


def refit(rest: Tensor, old: Group) -> Group:
    """One turn of Tucker-2 by alternation (HOOI): the best B given A, the best A given B, the best E given both.

    Args:
        rest: what is left over, (rows, cols, n); what ``old`` fits is added to it, and what the new group fits is
            taken off it, in place.
        old: the group to better.
    """
    rank = len(old.A)
    # A's rows are orthonormal, so (B E A) A^T = B E: the sum of rest and old is never formed.
    seen = old.A @ rest + torch.einsum("ib,ban->ian", old.B, old.E)
    B = leading_left(seen.flatten(1), rank)
    old_right = torch.einsum("ban,aj->bjn", old.E, old.A)
    seen = torch.tensordot(B, rest, dims=([0], [0])) + torch.tensordot(B.T @ old.B, old_right, dims=1)
    A = leading_left(seen.transpose(0, 1).flatten(1), rank).T
    new = Group(B, A @ seen, A)
    change = torch.cat([old_right, -torch.einsum("ban,aj->bjn", new.E, new.A)])
    rest.flatten(1).addmm_(torch.cat([old.B, new.B], dim=1), change.flatten(1))
    return new


def start(rest: Tensor, rank: int) -> Group:
    """An empty group (E zero) whose A spans the leading right directions of all columns together."""
    rows, cols, n = rest.shape
    A = leading_left(rest.transpose(0, 1).flatten(1), rank).T
    return Group(rest.new_zeros(rows, rank), rest.new_zeros(rank, rank, n), A)


def fit_adaptive(
    tensors: Sequence[Tensor], ranks: Sequence[int], groups: Sequence[int], shared: bool = True, turns: int = 20
) -> tuple[Tensor | None, list[list[Group]], list[float]]:
    r"""Minimise :math:`\sum_i \|T_i - T^{shared} - \sum_k B_i^k E_i^k A_i^k\|^2` over all columns of the generators.

    T_i holds what layer i's generator multiplies each entry of the query with, and its bias as one more column. The
    query comes out of a LayerNorm: its entries are about 1 in size, as the bias's factor is, and all columns count
    alike. One group is a Tucker-2 model: B and A are common to the n columns, E is each column's own. Several groups
    are fitted one after the other, each to what the others leave over; that can end in a local optimum.

    Args:
        tensors: T_i, (rows, cols, n) each.
        ranks, groups: r_i and K_i; K_i = 0 for a layer without a private part.
        shared: ``False`` leaves T_shared out.
        turns: how often shared and private parts are refitted in turn.

    Returns:
        T_shared; the groups of each layer; the sum of squares after every turn.
    """
    rests = [t.to(torch.float64, copy=True, memory_format=torch.contiguous_format) for t in tensors]
    common = torch.zeros_like(rests[0])
    fits: list[list[Group]] = [[] for _ in rests]
    history = []
    for _ in range(turns):
        if shared:
            change = mean_of(rests)
            common += change
            for rest in rests:
                rest -= change
        for rest, fit, rank, count in zip(rests, fits, ranks, groups, strict=True):
            for k in range(count):
                if k == len(fit):
                    fit.append(start(rest, rank))
                fit[k] = refit(rest, fit[k])
        history.append(sum(rest.square().sum().item() for rest in rests))
    return common if shared else None, fits, history


@torch.no_grad()
def fit_lorst_(
    lorst: LORST, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, turns: int = 20
) -> list[FitError]:
    """Fill a LORST so that layer i is as near as possible to x W_i^T + b_i; the biases are kept exactly.

    A direction in which nothing is left to fit keeps LORS's own start, B zero and A random, so that it can learn.

    Args:
        lorst: filled in place.
        weights, biases: W_i (out, in) and b_i (out,) of every layer.
        turns: see :func:`fit_static`.

    Returns:
        The error of every layer.
    """
    ranks = [0 if p is None else len(p.A) for p in lorst.private]
    common, pairs, _ = fit_static(weights, ranks, lorst.shared is not None, turns)
    if lorst.shared is not None and common is not None:
        lorst.shared.copy_(common)
    for weight, private, (B, A) in zip(weights, lorst.private, pairs, strict=True):
        if private is None:
            continue
        private.reset_parameters()
        size = A.norm(dim=1)
        used = size > 1e-7 * weight.norm()
        private.B.copy_(B * (size * used).sqrt())
        private.A[used] = (A / size.sqrt()[:, None])[used].to(private.A)
    for ours, bias in zip(lorst.bias or (), biases or (), strict=True):
        ours.copy_(bias)
    mean = mean_of(weights)
    return [FitError(_relative(w - mean, w), _relative(w - lorst.fold(i)[0], w)) for i, w in enumerate(weights)]


@torch.no_grad()
def fit_lorsa_(
    lorsa: LORSA, weights: Sequence[Tensor], biases: Sequence[Tensor], turns: int = 20
) -> list[list[FitError]]:
    """Fill a LORSA so that layer i generates as nearly as possible what AdaptiveWeights(weight_i, bias_i) does.

    Args:
        lorsa: filled in place.
        weights, biases: (copies * sum(rows * cols), m) and (copies * sum(rows * cols),) of every layer.
        turns: see :func:`fit_adaptive`.

    Returns:
        The error of every layer, one per shape (all copies and the bias together).
    """
    shapes, copies = lorsa.shapes, lorsa.copies
    size, columns = sum(rows * cols for rows, cols in shapes), weights[0].shape[1] + 1
    plain = [blocks_of(w, b, shapes, copies) for w, b in zip(weights, biases, strict=True)]
    ranks = [0 if p is None else p.rank for p in lorsa.private]
    groups = [0 if p is None else p.groups for p in lorsa.private]
    common = torch.zeros(copies * size, columns, dtype=torch.float64)
    cores = [
        torch.zeros(copies * k * len(shapes) * r * r, columns, dtype=torch.float64)
        for r, k in zip(ranks, groups, strict=True)
    ]
    for s, copy in itertools.product(range(len(shapes)), range(copies)):
        shared, fits, _ = fit_adaptive(
            [blocks[s][copy] for blocks in plain], ranks, groups, lorsa.shared is not None, turns
        )
        if shared is not None:
            _split(common, shapes, copies)[s][copy] = shared
        for private, core, fit in zip(lorsa.private, cores, fits, strict=True):
            if private is None:
                continue
            for k, group in enumerate(fit):
                part = slice(k * private.rank, (k + 1) * private.rank)
                private.B[s][copy, :, part] = group.B.to(private.B[s])
                private.A[s][copy, part] = group.A.to(private.A[s])
                core_shapes = [(private.rank, private.rank)] * len(shapes)
                _split(core, core_shapes, copies * private.groups)[s][copy * private.groups + k] = group.E.to(core)
    if lorsa.shared is not None:
        lorsa.shared.weight.copy_(common[:, :-1])
        lorsa.shared.bias.copy_(common[:, -1])
    for private, core in zip(lorsa.private, cores, strict=True):
        if private is not None:
            private.E.weight.copy_(core[:, :-1])
            private.E.bias.copy_(core[:, -1])
    errors = []
    mean = blocks_of(mean_of(weights), mean_of(biases), shapes, copies)
    for i, blocks in enumerate(plain):
        ours = blocks_of(*lorsa.fold(i), shapes, copies)
        errors.append(
            [FitError(_relative(w - m, w), _relative(w - f, w)) for w, m, f in zip(blocks, mean, ours, strict=True)]
        )
    return errors


def _split(columns: Tensor, shapes: Sequence[tuple[int, int]], copies: int) -> list[Tensor]:
    """(copies * sum(rows * cols), n) -> one view (copies, rows, cols, n) per shape."""
    parts = columns.unflatten(0, (copies, -1)).split([rows * cols for rows, cols in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def blocks_of(weight: Tensor, bias: Tensor, shapes: Sequence[tuple[int, int]], copies: int) -> list[Tensor]:
    """A generator's weight, with its bias as one more column, as one (copies, rows, cols, m + 1) per shape."""
    return _split(torch.cat([weight, bias[:, None]], dim=1), shapes, copies)
