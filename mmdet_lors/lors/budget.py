"""Spend one budget of parameters on all layers together, where it leaves the smallest error."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adaptive import LORSA
from .targets import checked_layers, stacks_of
from .warm_start import blocks_of, mean_of, refit, start


class Size(NamedTuple):
    """One size that a layer's private part may have."""

    rank: int
    groups: int
    cost: float
    """Parameters."""
    error: float
    """The sum of squares of what it leaves of the layer's plain weight."""


def spend(
    options: Sequence[Sequence[tuple[float, float]]], budget: float
) -> tuple[list[int], list[tuple[float, float]]]:
    r"""Choose a size for every part.

    .. math:: \min_o\ \sum_l e_l(o_l) \quad\text{with}\quad \sum_l c_l(o_l) \le \text{budget}

    Each part goes along the lower convex hull of its error over its cost; of all parts' next steps the one that gains
    most per cost is taken. That is the optimum where errors are convex in the cost, up to the last step.

    Args:
        options: per part (cost, error) of its sizes, from the cheapest on; the cheapest together must fit the budget.
        budget: of the sum of costs.

    Returns:
        The index of every part's size; cost and error of all together, from the cheapest sizes on, after each step.
    """
    chosen = [0] * len(options)
    cost, error = (sum(part[0][i] for part in options) for i in (0, 1))
    curve = [(cost, error)]
    ended = set()
    for _, part, to in heapq.merge(*map(_steps, range(len(options)), options), key=lambda step: -step[0]):
        if part in ended:
            continue
        sizes, now = options[part], chosen[part]
        allowed = budget - cost + sizes[now][0]
        if sizes[to][0] > allowed:  # as far as it goes; other parts may have smaller steps
            ended.add(part)
            to = min((o for o in range(now, to) if sizes[o][0] <= allowed), key=lambda o: sizes[o][1])
        cost += sizes[to][0] - sizes[now][0]
        error += sizes[to][1] - sizes[now][1]
        chosen[part] = to
        curve.append((cost, max(error, 0.0)))
    return chosen, curve


def _steps(part: int, sizes: Sequence[tuple[float, float]]) -> Iterator[tuple[float, int, int]]:
    """(gain per cost, part, size) along the lower convex hull of the error over the cost, steepest first."""

    def slope(a: int, b: int) -> float:
        return (sizes[a][1] - sizes[b][1]) / (sizes[b][0] - sizes[a][0])

    hull: list[int] = []
    for size, (cost, error) in enumerate(sizes):
        if hull and error >= sizes[hull[-1]][1]:
            continue
        while hull and cost <= sizes[hull[-1]][0]:
            hull.pop()
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-2], size):
            hull.pop()
        hull.append(size)
    for a, b in zip(hull, hull[1:], strict=False):
        yield slope(a, b), part, b


@torch.no_grad()
def static_sizes(weights: Sequence[Tensor]) -> list[list[Size]]:
    r"""Per layer of a LORST, every rank, of which W_i - W_shared leaves :math:`\sum_{j > r} \sigma_{i,j}^2`.

    :math:`\sigma_{i,j}` are the singular values of W_i - mean W, for weights (out, in) of one shape.
    """
    mean = mean_of([weight.double() for weight in weights])
    rows, cols = mean.shape
    found = []
    for weight in weights:
        rest = weight.double() - mean
        squares = torch.linalg.eigvalsh(rest @ rest.T if rows < cols else rest.T @ rest).clamp(min=0)
        left = [*squares.cumsum(0).flip(0).tolist(), 0.0]
        found.append([Size(max(r, 1), int(r > 0), r * (rows + cols), error) for r, error in enumerate(left)])
    return found


@torch.no_grad()
def adaptive_sizes(
    lorsa: LORSA, weights: Sequence[Tensor], biases: Sequence[Tensor], most_groups: int = 8, turns: int = 2
) -> list[list[Size]]:
    """Per layer of a LORSA, sizes with r a power of two; their errors are those of :func:`fit_adaptive`.

    The groups are fitted one after the other to what is left of W_i - mean W, in float64.

    Args:
        lorsa: its shapes and copies.
        weights, biases: see :func:`fit_lorsa_`.
        most_groups: the largest K.
        turns: of each group's fit.

    Returns:
        From K = 0, W_shared alone, on, by cost.
    """
    shapes, copies = lorsa.shapes, lorsa.copies
    columns = weights[0].shape[1] + 1
    mean = mean_of([weight.double() for weight in weights]), mean_of([bias.double() for bias in biases])
    found = []
    for weight, bias in zip(weights, biases, strict=True):
        rests = [rest for block in blocks_of(weight - mean[0], bias - mean[1], shapes, copies) for rest in block]
        sizes = [Size(1, 0, 0, sum_of_squares(rests))]
        rank = 1
        while rank <= min(side for shape in shapes for side in shape):
            cost = copies * sum(rank * (rows + cols) + rank * rank * columns for rows, cols in shapes)
            left = [rest.clone(memory_format=torch.contiguous_format) for rest in rests]
            for groups in range(1, most_groups + 1):
                for rest in left:
                    group = start(rest, rank)
                    for _ in range(turns):
                        group = refit(rest, group)
                sizes.append(Size(rank, groups, groups * cost, sum_of_squares(left)))
            rank *= 2
        found.append(sorted(sizes, key=lambda size: size.cost))
    return found


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """Of all entries of all of them."""
    return sum(tensor.double().square().sum().item() for tensor in tensors)


def ranks_for_budget(
    layers: Iterable[nn.Module],
    targets: str | Sequence[str],
    budget: int,
    share: Sequence[int | str] | None = None,
) -> dict[str, Any]:
    r"""The ranks with which :func:`share_stack` and init 'trained' come nearest to the present weights.

    .. math:: \min_r\ \sum_{W} \sum_i \sum_{j > r_{W,i}} \sigma_{W,i,j}^2 \quad\text{with}\quad
        \sum_W \Big( in_W\, out_W + \sum_i r_{W,i}\, (in_W + out_W) \Big) \le \text{budget}

    W are the stacks of weights, i their layers, and :math:`\sigma` the singular values of :math:`W_i - mean_i W_i`.
    The rule is that of :func:`mmdet_lors.pela.allocate`; K is 1, or 0 where a layer gets W_shared alone.

    Args:
        layers, targets, share: see :func:`share_stack`.
        budget: parameters of all these weights together, W_shared, A and B.

    Returns:
        ``targets``, ``rank`` and ``groups`` for :func:`share_stack`, or for a stack of ``WithLORS`` in a config.

    Raises:
        ValueError: a budget below all W_shared or above the plain weights; weights without finite values; what
            :func:`share_stack` refuses.
    """
    layers = checked_layers(layers)
    stacks = list(stacks_of(layers, targets, share))
    for name, _, weights in stacks:
        for i, weight in weights.items():
            if weight.is_meta or not weight.isfinite().all():
                raise ValueError(f"budget needs trained weights: layer {i}'s {name} has values that are not finite")
    shared = sum(next(iter(weights.values())).numel() for _, _, weights in stacks)
    plain = sum(weight.numel() for _, _, weights in stacks for weight in weights.values())
    if not shared <= budget <= plain:
        raise ValueError(f"budget must be between {shared:,}, all W_shared, and {plain:,}, as now, got {budget:,}")
    sizes = [layer for _, _, weights in stacks for layer in static_sizes(list(weights.values()))]
    options = [[(size.cost, size.error) for size in layer] for layer in sizes]
    chosen = iter(spend(options, budget - shared)[0])
    ranks: dict[str, list[int]] = {}
    for name, _, weights in stacks:
        found = ranks.setdefault(name, [0] * len(layers))
        for i in weights:
            found[i] = next(chosen)
    return dict(
        targets=list(ranks),
        rank={name: [max(rank, 1) for rank in found] for name, found in ranks.items()},
        groups={name: [int(rank > 0) for rank in found] for name, found in ranks.items()},
    )
