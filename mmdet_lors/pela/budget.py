"""Which layer gets which rank when all of them together may cost so much. Needs PyTorch alone."""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .calibration import Moment, Moments, moments_of
from .choice import OMIT, choose
from .low_rank import squared_singular_values


@dataclass(frozen=True)
class Allocation:
    """What a budget buys."""

    ranks: dict[str, int]
    """Of the layers that are factorised, by name, for :func:`compress`; those that are missing stay whole."""
    curve: list[tuple[int, float]]
    """Cost and relative error after each step, from the least ranks on: the error over the budget."""


def allocate(
    model: nn.Module,
    parameters: int | None = None,
    multiply_adds: float | None = None,
    omit: Sequence[str] = OMIT,
    calibration: Moments | None = None,
    convolutions: bool = False,
    minimum: int = 1,
    maximum: int | None = None,
) -> Allocation:
    r"""Spend a budget on the ranks of all layers together, where it leaves the smallest error.

    .. math:: \min_r\ \sum_l w_l \sum_{i > r_l} \sigma_{l,i}^2
        \quad\text{with}\quad \sum_l r_l\, (in_l + out_l)\, n_l \le \text{budget}

    :math:`\sigma_{l,i}` are the singular values of W_l, and :math:`w_l = 1`. With calibration that has gradients they
    are those of W_l L_l, of its outputs, and :math:`w_l = u_l\, \mathrm{E}\, (\partial L / \partial y)^2`: what the
    error adds to the mean square of the loss's change if gradients and errors are independent. :math:`u_l` are uses per
    call of the model; :math:`n_l` too for multiply-adds, and 1 for parameters. A layer's error is convex in its rank,
    so that always taking the direction with the largest :math:`w \sigma^2` per cost is the optimum; a layer becomes
    whole at once, at a cost of in * out, where that is on the lower convex hull of its error over its cost.

    Args:
        model: any module.
        parameters: budget of the whole model, what is not compressed included.
        multiply_adds: budget of the layers that can be compressed, per call of the model as in the calibration.
        omit, convolutions: see :func:`compress`.
        calibration: from :func:`second_moments`; with a ``loss`` there, ranks are its, else the weights'.
        minimum, maximum: least and largest rank of every layer; with a maximum none stays whole.

    Raises:
        ValueError: not one budget of the two; multiply-adds without calibration; a budget below what the least ranks
            need, or above the model.
    """
    if (parameters is None) == (multiply_adds is None):
        raise ValueError("give one budget: parameters or multiply_adds")
    if minimum < 1 or (maximum is not None and maximum < minimum):
        raise ValueError(f"minimum must be 1 or more and maximum not below it, got {minimum} and {maximum}")
    if multiply_adds is not None and calibration is None:
        raise ValueError("multiply_adds needs calibration, which counts how often each layer is used")
    by_weight: dict[Tensor, list[str]] = defaultdict(list)
    for module, (name, *_) in choose(model, omit, convolutions).items():
        by_weight[module.weight].append(name)
    moments = moments_of(by_weight, calibration)
    layers = [
        _Spectrum(names, weight.flatten(1), moment, multiply_adds is not None, minimum, maximum)
        for (weight, names), moment in zip(by_weight.items(), moments, strict=True)
    ]

    kind, budget, others = "multiply-adds", multiply_adds, 0.0
    if parameters is not None:
        kind, budget = "parameters", parameters
        others = sum(p.numel() for p in model.parameters()) - sum(layer.whole for layer in layers)
    assert budget is not None
    spent = others + sum(layer.cost(layer.rank) for layer in layers)
    if budget < spent:
        raise ValueError(f"{budget:,.0f} {kind} are below the {spent:,.0f} that rank {minimum} everywhere needs")
    if budget > (all_of_it := others + sum(layer.whole for layer in layers)):
        raise ValueError(f"{budget:,.0f} {kind} are above the {all_of_it:,.0f} of the model")

    energy = sum(layer.tail[0] for layer in layers) or 1.0
    error = sum(layer.tail[layer.rank] for layer in layers)
    curve = [(round(spent), error / energy)]
    ended = set()
    for _, layer, rank in heapq.merge(*(layer.steps() for layer in layers), key=lambda step: -step[0]):
        if layer in ended:
            continue
        cost = layer.cost(rank) - layer.cost(layer.rank)
        if spent + cost > budget:
            # As far as it goes; other layers may have smaller steps.
            ended.add(layer)
            rank = min(layer.rank + int((budget - spent) // layer.unit), layer.most)
            cost = layer.cost(rank) - layer.cost(layer.rank)
        error += layer.error(rank) - layer.error(layer.rank)
        spent, layer.rank = spent + cost, rank
        curve.append((round(spent), max(error, 0.0) / energy))
    return Allocation({name: layer.rank for layer in layers if not layer.is_whole for name in layer.names}, curve)


class _Spectrum:
    """One weight's error and cost at every rank; rank min(in, out) stands for the whole weight."""

    def __init__(
        self,
        names: Sequence[str],
        weight: Tensor,
        moment: Moment | None,
        per_use: bool,
        minimum: int,
        maximum: int | None,
    ) -> None:
        rows, cols = weight.shape
        uses = moment.uses if moment is not None and per_use else 1
        self.names, self.full = names, min(rows, cols)
        self.unit, self.whole = (rows + cols) * uses, rows * cols * uses
        self.most = min(rows * cols // (rows + cols), maximum or self.full)
        self.can_be_whole = maximum is None
        self.rank = min(minimum, self.most) or self.full  # a single row or column has nothing to factorise
        if moment is None or moment.gradient is None:
            squares = squared_singular_values(weight)
        else:
            squares = squared_singular_values(weight, moment.matrix) * (moment.uses * moment.gradient)
        self.tail: list[float] = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]

    @property
    def is_whole(self) -> bool:
        return self.rank == self.full

    def cost(self, rank: int) -> float:
        return self.whole if rank == self.full else rank * self.unit

    def error(self, rank: int) -> float:
        return self.tail[rank]

    def steps(self) -> Iterator[tuple[float, "_Spectrum", int]]:
        """(gain per cost, this, rank) along the lower convex hull of the error over the cost, steepest first."""
        hull: list[int] = []
        for rank in [*range(self.rank, self.most + 1), *([self.full] if self.can_be_whole else [])]:
            while hull and self.cost(rank) <= self.cost(hull[-1]):
                hull.pop()
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-2], rank):
                hull.pop()
            hull.append(rank)
        for a, b in zip(hull, hull[1:], strict=False):
            yield self._slope(a, b), self, b

    def _slope(self, a: int, b: int) -> float:
        return (self.error(a) - self.error(b)) / (self.cost(b) - self.cost(a))
