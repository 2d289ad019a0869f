"""LORS for any stack: named weights of a sequence of layers become LORST or LORSA, whatever the layers are made of.

A layer's own code stays as it is. With LORST it still reads ``module.weight`` (or ``in_proj_weight``), which is now
computed when it is read: W_shared + B A. That costs out * in * K * r multiply-adds per use, against tokens * out * in
of the product it is read for. With LORSA the weight depends on the input: the layer still calls its Linear, which now
computes more (:mod:`.stacked_adaptive`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .allocation import PerLayer, per_layer
from .budget import ranks_for_budget
from .stacked import SUFFIX, StackedWeight, attach, computed_names, detach
from .stacked_adaptive import CONDITIONS, AdaptiveStackedWeight
from .static import LORST
from .targets import Stack, checked_layers, checked_targets, setting, sharable, stacks_of
from .warm_start import FitError, fit_lorst_

INITS = ("first", "paper", "trained")
KINDS = ("static", "adaptive")


def _lorst(weights: Sequence[Tensor], ranks: Sequence[int], init: str, turns: int) -> tuple[LORST, list[FitError]]:
    """A LORST for weights W_i (out, in) with K_i * r_i = ranks[i], and for 'trained' how far it is from them.

    Weights that are not finite (allocated, but not initialised yet) cannot be fitted: error nan, the start of 'first'.
    """
    weights = [w.detach() for w in weights]
    rows, cols = weights[0].shape
    groups = [int(rank > 0) for rank in ranks]
    lorst = LORST(cols, rows, len(weights), rank=[max(rank, 1) for rank in ranks], groups=groups, bias=False)
    lorst.to(weights[0])
    if init == "trained" and all(w.isfinite().all() for w in weights):
        return lorst, fit_lorst_(lorst, weights, None, turns)
    if init != "paper":
        lorst.shared = nn.Parameter(weights[0].clone())
    return lorst, [FitError(float("nan"), float("nan"))] * len(weights) if init == "trained" else []


def share_stack(
    layers: Iterable[nn.Module],
    targets: str | Sequence[str],
    rank: PerLayer | Mapping[str, PerLayer] = 8,
    groups: PerLayer | Mapping[str, PerLayer] = 1,
    share: Sequence[int | str] | None = None,
    init: str = "first",
    turns: int = 1,
    kind: str = "static",
    condition: str = "token",
    budget: int | None = None,
) -> dict[str, list[FitError]]:
    r"""Turn the named weights of a stack of layers into LORST, or Linears into LORSA, in place.

    .. math:: W_i = W^{shared} + \sum_{k=1}^{K_i} B_i^k A_i^k \qquad\text{(static, LORST)}

    .. math:: y_i = W^{shared} x + b_i + \sum_{k=1}^{K_i} B_i^k\, E_i^k(h)\, A_i^k x \qquad\text{(adaptive, LORSA)}

    :math:`W^{shared}, W_i \in R^{out \times in}`; :math:`B_i^k \in R^{out \times r_i}`;
    :math:`A_i^k \in R^{r_i \times in}`; :math:`E_i^k(h) = \mathrm{reshape}(\mathrm{Linear}_i(h)) \in R^{r_i \times
    r_i}`. A, B, E and everything that is not a target, biases too, stay the layer's own.
    Sources: LORS paper, equations 7 and 8; per group of layers, with K = 0 or with init 'trained' it is a Relaxed
    Recursive Transformer (arXiv 2410.20672). Adaptive: equations 11 and 12, and appendix A.2, which calls LORSA in
    Transformers a promising attempt and says no more of it: h, and W_shared as a parameter, are ours.

    The first layer of those that share keeps W_shared: the parameters of ``attn.qkv`` are then
    ``attn.qkv.weight_lorst.shared`` (first layer), ``attn.qkv.weight_lorst.private.A`` and ``.B`` (K_i > 0).

    Args:
        layers: modules of one architecture. Nothing is changed if anything is wrong with any argument.
        targets: names relative to a layer, or patterns (``*``, ``?``, ``[...]``; ``*`` crosses dots). 'mlp.fc1' means
            the weight of that Linear, 'self_attn.in_proj_weight' an ``nn.MultiheadAttention``'s, 'mlp.*' every such
            weight below mlp.
        rank: r, one for all or one per layer, or a dict with such an entry for every target.
        groups: K, likewise; 0 gives a layer W_shared alone, 0 everywhere is a recurrent stack.
        share: one label per layer; layers of equal labels share. ``[0, 1, 0, 1]``: every other one. Default: all.
        init: 'first' starts every layer as the first one's present weight: W_shared = W_1, A Kaiming, B zero. 'paper'
            starts anew, whatever the present weights are: W_shared and A Kaiming, B zero (section 3.3 of the paper).
            'trained' stays near the present weights: W_shared their mean, B A the truncated SVD of the rest.
            Adaptive layers start from the same W_shared, with E zero, A and B Kaiming: 'trained' is the mean alone.
        turns: for 'trained': how often mean and SVD are fitted in turn. More than 1 comes nearer to the weights.
        kind: 'static' is LORST, 'adaptive' LORSA; its targets are Linears that the layer calls. In a layer with K = 0
            both are W_shared.
        condition: for 'adaptive', what h is: 'token', x of each token, or 'mean', the mean over all tokens of an
            element of the batch, see :class:`.AdaptiveResidual`.
        budget: for 'trained', parameters of all these weights together; :func:`ranks_for_budget` spends it, instead of
            ``rank`` and ``groups``.

    Returns:
        For 'trained', per weight one relative error per layer: what W_shared alone and what the fit leaves over, each
        as :math:`\|W_i - W_i'\|_F / \|W_i\|_F`. Empty for the others.

    Raises:
        ValueError: names the field, and the layer: layers of different shapes, a target that is missing or is no
            Linear's or in-projection's weight or is shared already, lists of the wrong length, K * r above
            min(out, in); for 'adaptive' a weight that its module reads, such as an in-projection.
    """
    layers, targets = checked_layers(layers), checked_targets(targets)
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    (turns,) = per_layer("turns", turns, 1, minimum=1)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if condition not in CONDITIONS:
        raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")
    if kind == "static" and condition != "token":
        raise ValueError(f"condition {condition!r} is for kind='adaptive'; static weights have none")
    if budget is not None:
        if (init, kind, rank, groups) != ("trained", "static", 8, 1):
            raise ValueError("budget chooses rank and groups, for init='trained' and kind='static': give neither")
        targets, rank, groups = ranks_for_budget(layers, targets, budget, share).values()
    for field, value in (("rank", rank), ("groups", groups)):
        if isinstance(value, Mapping) and (unknown := [key for key in value if key not in targets]):
            raise ValueError(f"{field} has an entry for {unknown[0]!r}, which is none of the targets")

    plan: list[tuple[Stack, list[tuple[int, int]]]] = []
    for stack in stacks_of(layers, targets, share, kind == "adaptive"):
        ranks = setting("rank", rank, stack.target, len(layers), minimum=1)
        counts = setting("groups", groups, stack.target, len(layers), minimum=0)
        for i, weight in stack.weights.items():
            if ranks[i] * counts[i] > (most := min(weight.shape)):
                raise ValueError(
                    f"rank: layer {i}'s {stack.name} has rank {ranks[i]} x {counts[i]} groups = "
                    f"{ranks[i] * counts[i]}, above {most}, the smaller side of the weight"
                )
        plan.append((stack, [(ranks[i], counts[i]) for i in stack.weights]))

    report: dict[str, list[FitError]] = {}
    places = [sharable(layer) for layer in layers]
    for (name, _, weights), sizes in plan:
        static = [r * K if kind == "static" else 0 for r, K in sizes]
        lorst, errors = _lorst(list(weights.values()), static, init, turns)
        first = None
        stacked: StackedWeight
        for position, ((i, weight), (r, K)) in enumerate(zip(weights.items(), sizes, strict=True)):
            if kind == "adaptive" and K:
                stacked = AdaptiveStackedWeight(lorst, position, first, init, turns, r, K, condition)
            else:
                stacked = StackedWeight(lorst, position, first, init, turns)
            if stacked.private is not None:
                stacked.private.requires_grad_(weight.requires_grad)
            attach(*places[i][name], stacked)
            first = first or stacked
        stacked.first.shared.requires_grad_(any(w.requires_grad for w in weights.values()))
        for i, error in zip(weights, errors, strict=False):
            report.setdefault(name, [error] * len(layers))[i] = error
    return report


class _Place(NamedTuple):
    """Where a stacked weight is used."""

    path: str
    module: nn.Module
    name: str
    weight: StackedWeight


def _stacks(layers: Iterable[nn.Module]) -> list[list[_Place]]:
    """The stacked weights of these layers, those that share together, in order.

    Raises:
        ValueError: there are none, or some of the layers that share are left out.
    """
    found: dict[int, list[_Place]] = defaultdict(list)
    seen = set()
    for layer in layers:
        for path, module in layer.named_modules():
            for name in computed_names(module):
                weight = getattr(module, name + SUFFIX)
                if id(weight) not in seen:
                    seen.add(id(weight))
                    full = f"{path}.{name}" if path else name
                    found[id(weight.first)].append(_Place(full, module, name, weight))
    if not found:
        raise ValueError("layers: none of them has a shared weight")
    for places in found.values():
        places.sort(key=lambda place: place.weight.position)
        if len(places) != places[0].weight.first.sharing:
            raise ValueError(
                f"layers: {places[0].path} is shared by {places[0].weight.first.sharing} layers, of which only "
                f"{len(places)} are here: they can only be folded together"
            )
    return list(found.values())


def _static_stacks(layers: Iterable[nn.Module]) -> list[list[_Place]]:
    """As :func:`_stacks`, of layers none of which is adaptive."""
    stacks = _stacks(layers)
    for place in (place for places in stacks for place in places):
        if isinstance(place.weight, AdaptiveStackedWeight):
            raise ValueError(
                f"layers: {place.path}: adaptive weights depend on the input: there is nothing to fold into"
            )
    return stacks


def fold_stack(layers: Iterable[nn.Module]) -> None:
    """Give the layers ordinary weights again, each of the value W_i that it has now: the plain architecture.

    Outputs stay equal; parameters, and their names, become what they were before :func:`share_stack`. An optimizer
    made before still holds the shared parameters: make a new one.

    Args:
        layers: all layers that share with each other, or ``[model]`` for every stack in a model.

    Raises:
        ValueError: none of the layers has a shared weight, some of those that share are missing, or a weight is
            adaptive.
    """
    for places in _static_stacks(layers):
        for place in places:
            detach(place.module, place.name)


@contextmanager
def plain_stack(layers: Iterable[nn.Module]) -> Iterator[dict[str, list[FitError]]]:
    """Within this context the layers are plain, to initialise them or to load plain weights; then they share again.

    Where a weight was changed meanwhile, its stack starts again from the plain weights, as ``init`` of
    :func:`share_stack` said. The shared and private parameters remain the same objects: an optimizer keeps them.

    Args:
        layers: as for :func:`fold_stack`.

    Yields:
        A dict that is filled on leaving: for each stack that was fitted again, under its first layer's name, one
        error per layer, as :func:`share_stack` returns them.

    Raises:
        ValueError: see :func:`fold_stack`.
    """
    layers = list(layers)
    _static_stacks(layers)
    with initial_stack(layers) as report:
        yield report


@contextmanager
def initial_stack(layers: Iterable[nn.Module]) -> Iterator[dict[str, list[FitError]]]:
    """As :func:`plain_stack`, for what initialises a model; an adaptive layer shows W_shared, what it starts as."""
    stacks = _stacks(layers)
    for place in (place for places in stacks for place in places):
        detach(place.module, place.name)
    before = [[getattr(p.module, p.name).detach().clone() for p in places] for places in stacks]
    switches = [_switches(places) for places in stacks]
    report: dict[str, list[FitError]] = {}
    try:
        yield report
        for places, old in zip(stacks, before, strict=True):
            now = [getattr(p.module, p.name).detach() for p in places]
            if not all(torch.equal(a, b) for a, b in zip(now, old, strict=True)):
                errors = _restart([p.weight for p in places], now)
                if errors:
                    report[places[0].path] = errors
    finally:
        for places, old in zip(stacks, switches, strict=True):
            if (now := _switches(places)) != old:
                places[0].weight.first.shared.requires_grad_(any(now))
                for place, trained in zip(places, now, strict=True):
                    if place.weight.private is not None:
                        place.weight.private.requires_grad_(trained)
            for place in places:
                attach(place.module, place.name, place.weight)


def _switches(places: Sequence[_Place]) -> list[bool]:
    """Which of these plain weights want a gradient."""
    return [getattr(place.module, place.name).requires_grad for place in places]


@torch.no_grad()
def _restart(stack: Sequence[StackedWeight], weights: Sequence[Tensor]) -> list[FitError]:
    """Fill a stack again from plain weights, in place."""
    first = stack[0]
    static = [0 if isinstance(weight, AdaptiveStackedWeight) else weight.rank for weight in stack]
    lorst, errors = _lorst(weights, static, first.init, first.turns)
    assert lorst.shared is not None
    first.shared.copy_(lorst.shared)
    for ours, fresh in zip(stack, lorst.private, strict=True):
        if isinstance(ours, AdaptiveStackedWeight):
            ours.private.reset_parameters()
        elif ours.private is not None and fresh is not None:
            ours.private.A.copy_(fresh.A)
            ours.private.B.copy_(fresh.B)
    return errors
