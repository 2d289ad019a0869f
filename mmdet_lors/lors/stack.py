"""LORS for any stack: named weights of a sequence of layers become LORST, whatever the layers are made of.

A layer's own code stays as it is. It goes on reading ``module.weight`` (or ``in_proj_weight``), which is now computed
when it is read: W_shared + B A. That costs out * in * K * r multiply-adds per use, against tokens * out * in of the
product it is read for.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .allocation import PerLayer, per_layer
from .computed import ComputesWeights, computed_weight
from .static import LORST
from .warm_start import FitError, fit_lorst_

INITS = ("paper", "trained")

_SUFFIX = "_lorst"
_IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class StackedWeight(nn.Module):
    r"""One layer's weight in a stack, :math:`W_i = W^{shared} + \sum_k B_i^k A_i^k`, (out, in).

    The first layer of those that share holds W_shared. The others find it through the first one's module, which is no
    child of theirs: so it has one name in ``state_dict()`` and ``parameters()``, and follows every copy, move and load.

    Args:
        lorst: where W_shared, B_i and A_i are taken from.
        position: i, the layer's place among those that share.
        first: the first layer's; None for the first itself.
        init: see :func:`share_stack`; the first keeps it for :func:`plain_stack`.
        turns: likewise.
    """

    def __init__(self, lorst: LORST, position: int, first: "StackedWeight | None", init: str, turns: int) -> None:
        super().__init__()
        self.private = lorst.private[position]
        self.position = position
        # Past nn.Module, which would make it a child.
        object.__setattr__(self, "_first", first)
        if first is None:
            self.shared, self.sharing, self.init, self.turns = lorst.shared, lorst.num_layers, init, turns

    @property
    def first(self) -> "StackedWeight":
        """The one that holds W_shared."""
        return self if self._first is None else self._first

    @property
    def rank(self) -> int:
        """K_i * r_i."""
        return 0 if self.private is None else len(self.private.A)

    def forward(self) -> Tensor:
        """W_i, (out, in)."""
        shared = self.shared if self._first is None else self._first.shared
        # One kernel for W_shared + B A; under autocast it also casts.
        return shared if self.private is None else torch.addmm(shared, self.private.B, self.private.A)

    def extra_repr(self) -> str:
        return f"position={self.position}, rank={self.rank}, holds_shared={self._first is None}"


@cache
def _computed(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``plain`` that computes the named weights instead of storing them.

    As ``torch.nn.utils.parametrize`` does, but with one class per kind of module, which is never changed afterwards.
    parametrize changes a class that a module has in common with its copies: folding a copy breaks the original.
    """

    def computed(name: str) -> property:
        remedy = f"{name} is computed, W_shared + B A: write within plain_stack(layers), or to {name}{_SUFFIX}"
        return computed_weight(name + _SUFFIX, remedy)

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        # Copying and pickling: the class has no name to be imported by.
        return _new, (plain, names), self.__getstate__()

    body = dict(__reduce_ex__=__reduce_ex__, __module__=__name__, plain_class=plain, computed_weights=names)
    return type(f"Stacked{plain.__name__}", (ComputesWeights, plain), body | {name: computed(name) for name in names})


def _new(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _computed(plain, names)
    return kind.__new__(kind)


def _names(module: nn.Module) -> tuple[str, ...]:
    """The weights of this module that are computed."""
    return getattr(type(module), "computed_weights", ())


def _set_names(module: nn.Module, names: tuple[str, ...]) -> None:
    plain = getattr(type(module), "plain_class", type(module))
    module.__class__ = _computed(plain, names) if names else plain


def _attach(module: nn.Module, name: str, weight: StackedWeight) -> None:
    """Compute ``module.<name>`` from now on."""
    delattr(module, name)
    module.add_module(name + _SUFFIX, weight.train(module.training))
    _set_names(module, (*_names(module), name))


@torch.no_grad()
def _detach(module: nn.Module, name: str) -> None:
    """Store ``module.<name>`` again: an ordinary parameter with the value that it has now."""
    weight: StackedWeight = getattr(module, name + _SUFFIX)
    trained = weight.first.shared if weight.private is None else weight.private.B
    value = nn.Parameter(weight().clone(), requires_grad=trained.requires_grad)
    delattr(module, name + _SUFFIX)
    _set_names(module, tuple(n for n in _names(module) if n != name))
    # Before the bias, as in a module that was never shared.
    others = list(module.named_parameters(recurse=False))
    module.register_parameter(name, value)
    for other, parameter in others:
        delattr(module, other)
        module.register_parameter(other, parameter)


def _lorst(weights: Sequence[Tensor], ranks: Sequence[int], init: str, turns: int) -> tuple[LORST, list[FitError]]:
    """A LORST for weights W_i (out, in) with K_i * r_i = ranks[i], and for 'trained' how far it is from them.

    Weights that are not finite (allocated, but not initialised yet) cannot be fitted: error nan, the paper's start.
    """
    weights = [w.detach() for w in weights]
    rows, cols = weights[0].shape
    groups = [int(rank > 0) for rank in ranks]
    lorst = LORST(cols, rows, len(weights), rank=[max(rank, 1) for rank in ranks], groups=groups, bias=False)
    lorst.to(weights[0])
    if init == "trained" and all(w.isfinite().all() for w in weights):
        return lorst, fit_lorst_(lorst, weights, None, turns)
    with torch.no_grad():
        lorst.shared.copy_(weights[0])
    return lorst, [FitError(float("nan"), float("nan"))] * len(weights) if init == "trained" else []


def _sharable(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Full name -> module and attribute, of every weight of this layer that can be shared."""
    found = {}
    for path, module in layer.named_modules():
        names = ("weight",) if isinstance(module, nn.Linear) else ()
        if isinstance(module, nn.MultiheadAttention):
            names = _IN_PROJECTIONS
        for name in names:
            if name in _names(module) or isinstance(getattr(module, name, None), nn.Parameter):
                found[f"{path}.{name}" if path else name] = module, name
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether a weight's full name, or its module's where the weight is a Linear's, fits the pattern."""
    module = name[: -len(".weight")] if name.endswith(".weight") else name
    return fnmatchcase(name, pattern) or fnmatchcase(module, pattern)


def _find(field: str, pattern: str, index: int, layer: nn.Module) -> list[str]:
    """Full names of one layer's weights that a target means."""
    sharable = _sharable(layer)
    if names := [name for name in sharable if _matches(name, pattern)]:
        return names
    there = [f"{name} is a {type(m).__name__}" for name, m in layer.named_modules() if name and _matches(name, pattern)]
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and _matches(name, pattern):
            raise ValueError(
                f"{field}: layer {index}'s {name}: its weight is computed already, by {type(module).__name__}"
            )
    there += [f"{name} is a parameter" for name, _ in layer.named_parameters() if _matches(name, pattern)]
    if there:
        raise ValueError(f"{field}: layer {index}'s {there[0]}, neither an nn.Linear nor an attention's in-projection")
    has = ", ".join(name.removesuffix(".weight") for name in sharable) or "none"
    raise ValueError(f"{field} matches nothing in layer {index}; weights that can be shared there: {has}")


def _resolve(layers: Sequence[nn.Module], targets: Sequence[str]) -> dict[str, str]:
    """Full name of a weight -> the target that means it; the same for every layer."""
    found: dict[str, str] = {}
    for t, pattern in enumerate(targets):
        if not isinstance(pattern, str):
            raise ValueError(f"targets[{t}] must be a name or pattern, got {pattern!r}")
        field = f"targets[{t}] {pattern!r}"
        names = _find(field, pattern, 0, layers[0])
        for i, layer in enumerate(layers[1:], start=1):
            theirs = _find(field, pattern, i, layer)
            if different := sorted(set(names) ^ set(theirs)):
                has, has_not = (0, i) if different[0] in names else (i, 0)
                raise ValueError(f"{field}: layer {has} has {different[0]}, layer {has_not} has not")
        for name in names:
            if name in found:
                raise ValueError(f"{field} and {found[name]!r} both mean {name}")
            found[name] = pattern
    return found


def _setting(field: str, value: PerLayer | Mapping[str, PerLayer], target: str, layers: int, minimum: int) -> list[int]:
    """rank or groups of one target, one per layer."""
    if isinstance(value, Mapping):
        if target not in value:
            raise ValueError(f"{field} has no entry for target {target!r}")
        field, value = f"{field}[{target!r}]", value[target]
    try:
        return per_layer(field, value, layers, minimum)
    except ValueError as error:
        raise ValueError(str(error).replace("stages", "layers")) from error


def _checked_layers(layers: Iterable[nn.Module]) -> list[nn.Module]:
    if not isinstance(layers, Iterable):
        raise ValueError(f"layers must be a sequence of modules, got a {type(layers).__name__}")
    layers = list(layers)
    if not layers:
        raise ValueError("layers is empty")
    seen: dict[int, int] = {}
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise ValueError(f"layers[{i}] is a {type(layer).__name__}, not an nn.Module")
        if (j := seen.setdefault(id(layer), i)) != i:
            raise ValueError(f"layers[{i}] is layers[{j}] itself: nothing of its own to share")
    return layers


def _groups_of(share: Sequence[int | str] | None, layers: int) -> list[list[int]]:
    """The layers of each label, in order."""
    labels = [0] * layers if share is None else share
    if not isinstance(labels, Sequence) or len(labels) != layers:
        entries = f"has {len(labels)} entries" if isinstance(labels, Sequence) else f"is {labels!r}, no list"
        raise ValueError(f"share {entries} for {layers} layers")
    found: dict[int | str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        if not isinstance(label, int | str):
            raise ValueError(f"share[{i}] must be a number or a name, got {label!r}")
        found[label].append(i)
    return list(found.values())


def _check_weights(name: str, weights: Mapping[int, Tensor]) -> None:
    """Weights of the layers that share, by layer: alike, and different parameters."""
    (first, reference), *others = weights.items()
    seen = {id(reference): first}
    for i, weight in others:
        if weight.shape != reference.shape:
            shapes = [f"{rows} x {cols}" for rows, cols in (weight.shape, reference.shape)]
            raise ValueError(f"layers: layer {i}'s {name} is {shapes[0]}, layer {first}'s is {shapes[1]}")
        for what in ("dtype", "device"):
            ours, theirs = getattr(weight, what), getattr(reference, what)
            if ours != theirs:
                raise ValueError(f"layers: layer {i}'s {name} has {what} {ours}, layer {first}'s has {theirs}")
        if (j := seen.setdefault(id(weight), i)) != i:
            raise ValueError(f"layers: layer {i}'s {name} is layer {j}'s own parameter")
    for i, weight in weights.items():
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            raise ValueError(f"targets: layer {i}'s {name} has hooks of its own, which a shared weight cannot keep")


def share_stack(
    layers: Iterable[nn.Module],
    targets: str | Sequence[str],
    rank: PerLayer | Mapping[str, PerLayer] = 8,
    groups: PerLayer | Mapping[str, PerLayer] = 1,
    share: Sequence[int | str] | None = None,
    init: str = "paper",
    turns: int = 1,
) -> dict[str, list[FitError]]:
    r"""Turn the named weights of a stack of layers into LORST, in place.

    .. math:: W_i = W^{shared} + \sum_{k=1}^{K_i} B_i^k A_i^k

    :math:`W^{shared}, W_i \in R^{out \times in}`; :math:`B_i^k \in R^{out \times r_i}`;
    :math:`A_i^k \in R^{r_i \times in}`. A, B and everything that is not a target, biases too, stay the layer's own.
    Sources: LORS paper, equations 7 and 8; per group of layers, with K = 0 or with init 'trained' it is a Relaxed
    Recursive Transformer (arXiv 2410.20672).

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
        init: 'paper' starts every layer as the first one's present weight: W_shared = W_1, A Kaiming, B zero.
            'trained' stays near the present weights: W_shared their mean, B A the truncated SVD of the rest.
        turns: for 'trained': how often mean and SVD are fitted in turn. More than 1 comes nearer to the weights.

    Returns:
        For 'trained', per weight one relative error per layer: what W_shared alone and what the fit leaves over, each
        as :math:`\|W_i - W_i'\|_F / \|W_i\|_F`. Empty for 'paper'.

    Raises:
        ValueError: names the field, and the layer: layers of different shapes, a target that is missing or is no
            Linear's or in-projection's weight or is shared already, lists of the wrong length, K * r above
            min(out, in).
    """
    layers = _checked_layers(layers)
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, Sequence) or not targets:
        raise ValueError(f"targets must be one or more names, got {targets!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    (turns,) = per_layer("turns", turns, 1, minimum=1)
    for field, value in (("rank", rank), ("groups", groups)):
        if isinstance(value, Mapping) and (unknown := [key for key in value if key not in targets]):
            raise ValueError(f"{field} has an entry for {unknown[0]!r}, which is none of the targets")
    sharing = _groups_of(share, len(layers))

    plan: list[tuple[str, list[int], list[int]]] = []
    places = [_sharable(layer) for layer in layers]
    for name, target in _resolve(layers, targets).items():
        for i, place in enumerate(places):
            if place[name][1] in _names(place[name][0]):
                raise ValueError(f"targets: layer {i}'s {name} is shared already")
        ranks = _setting("rank", rank, target, len(layers), minimum=1)
        counts = _setting("groups", groups, target, len(layers), minimum=0)
        for members in sharing:
            weights = {i: getattr(*places[i][name]) for i in members}
            _check_weights(name, weights)
            most = min(weights[members[0]].shape)
            for i in members:
                if ranks[i] * counts[i] > most:
                    raise ValueError(
                        f"rank: layer {i}'s {name} has rank {ranks[i]} x {counts[i]} groups = {ranks[i] * counts[i]}, "
                        f"above {most}, the smaller side of the weight"
                    )
            plan.append((name, members, [ranks[i] * counts[i] for i in members]))

    report: dict[str, list[FitError]] = {}
    for name, members, product in plan:
        weights = [getattr(*places[i][name]) for i in members]
        lorst, errors = _lorst(weights, product, init, turns)
        lorst.shared.requires_grad_(any(w.requires_grad for w in weights))
        first = None
        for position, (i, weight) in enumerate(zip(members, weights, strict=True)):
            stacked = StackedWeight(lorst, position, first, init, turns)
            if stacked.private is not None:
                stacked.private.requires_grad_(weight.requires_grad)
            _attach(*places[i][name], stacked)
            first = first or stacked
        for i, error in zip(members, errors, strict=False):
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
            for name in _names(module):
                weight = getattr(module, name + _SUFFIX)
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


def fold_stack(layers: Iterable[nn.Module]) -> None:
    """Give the layers ordinary weights again, each of the value W_i that it has now: the plain architecture.

    Outputs stay equal; parameters, and their names, become what they were before :func:`share_stack`. An optimizer
    made before still holds the shared parameters: make a new one.

    Args:
        layers: all layers that share with each other, or ``[model]`` for every stack in a model.

    Raises:
        ValueError: none of the layers has a shared weight, or some of those that share are missing.
    """
    for places in _stacks(layers):
        for place in places:
            _detach(place.module, place.name)


@contextmanager
def plain_stack(layers: Iterable[nn.Module]) -> Iterator[dict[str, list[FitError]]]:
    """Within this context the layers are plain, to initialise them or to load plain weights; then they share again.

    Where a weight was changed meanwhile, its stack starts anew from the plain weights, as ``init`` of
    :func:`share_stack` said. The shared and private parameters remain the same objects: an optimizer keeps them.

    Args:
        layers: as for :func:`fold_stack`.

    Yields:
        A dict that is filled on leaving: for each stack that was fitted again, under its first layer's name, one
        error per layer, as :func:`share_stack` returns them.

    Raises:
        ValueError: see :func:`fold_stack`.
    """
    stacks = _stacks(layers)
    for place in (place for places in stacks for place in places):
        _detach(place.module, place.name)
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
                _attach(place.module, place.name, place.weight)


def _switches(places: Sequence[_Place]) -> list[bool]:
    """Which of these plain weights want a gradient."""
    return [getattr(place.module, place.name).requires_grad for place in places]


@torch.no_grad()
def _restart(stack: Sequence[StackedWeight], weights: Sequence[Tensor]) -> list[FitError]:
    """Fill a stack anew from plain weights, in place."""
    first = stack[0]
    lorst, errors = _lorst(weights, [weight.rank for weight in stack], first.init, first.turns)
    first.shared.copy_(lorst.shared)
    for ours, fresh in zip(stack, lorst.private, strict=True):
        if fresh is not None:
            ours.private.A.copy_(fresh.A)
            ours.private.B.copy_(fresh.B)
    return errors
