"""Which layer gets which rank when all of them together may cost so much. Needs PyTorch alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mmdet_lors.lors.budget import spend

from .calibration import Moment, Moments, moments_of
from .choice import OMIT, choose, names_by_weight
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
    chosen_layers = choose(model, omit, convolutions, warn=calibration is None)
    by_weight = names_by_weight((name, layer) for layer, (name, *_) in chosen_layers.items())
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
    least = others + sum(layer.options[0][0] for layer in layers)
    most = others + sum(layer.whole for layer in layers)
    if budget < least:
        raise ValueError(f"{budget:,.0f} {kind} are below the {least:,.0f} that rank {minimum} everywhere needs")
    if budget > most:
        raise ValueError(f"{budget:,.0f} {kind} are above the {most:,.0f} of the model")
    chosen, curve = spend([layer.options for layer in layers], budget - others)
    energy = sum(layer.energy for layer in layers) or 1.0
    ranks: dict[str, int] = {}
    for layer, size in zip(layers, chosen, strict=True):
        if (rank := layer.ranks[size]) is not None:
            ranks |= dict.fromkeys(layer.names, rank)
    return Allocation(ranks, [(round(others + cost), error / energy) for cost, error in curve])


class _Spectrum:
    """One weight's cost and error at every rank that it may have."""

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
        self.names, self.whole = names, rows * cols * uses
        if moment is None or moment.gradient is None:
            squares = squared_singular_values(weight)
        else:
            squares = squared_singular_values(weight, moment.matrix) * (moment.uses * moment.gradient)
        left = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        self.energy = left[0]
        smaller = rows * cols // (rows + cols)
        last = min(smaller, maximum or smaller)
        self.ranks: list[int | None] = [*range(min(minimum, last), last + 1)] if smaller else []
        self.options = [(rank * (rows + cols) * uses, left[rank]) for rank in self.ranks if rank is not None]
        if maximum is None or not smaller:  # a single row or column has nothing to factorise
            self.ranks.append(None)
            self.options.append((self.whole, 0.0))
