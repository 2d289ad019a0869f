"""Which weights of which layers :func:`share_stack` is to share, and whether it can."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocation import PerLayer, per_layer
from .stacked import computed_names

_IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def sharable(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Full name -> module and attribute, of every weight of this layer that can be shared."""
    found = {}
    for path, module in layer.named_modules():
        names: tuple[str, ...] = ("weight",) if isinstance(module, nn.Linear) else ()
        if isinstance(module, nn.MultiheadAttention):
            names = _IN_PROJECTIONS
        for name in names:
            if name in computed_names(module) or isinstance(getattr(module, name, None), nn.Parameter):
                found[f"{path}.{name}" if path else name] = module, name
    return found


_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""These read the weights of Linears below them."""


def is_plain(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether calling this layer is x W^T + b, or W * x + b: a subclass may do more, which is found by asking it."""
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    methods = ("forward",) if kind is nn.Linear else ("forward", "_conv_forward")
    if all(getattr(type(layer), method) is getattr(kind, method) for method in methods):
        return True
    probe = copy.deepcopy(layer)
    weight, bias = probe.weight, probe.bias
    with torch.no_grad():
        # Its own weights may not be there yet.
        for p in (weight, bias):
            if p is not None:
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        try:
            if isinstance(layer, nn.Linear):
                x = torch.linspace(-1, 1, 2 * layer.in_features).view(2, -1).to(weight)
                expected = F.linear(x, weight, bias)
            else:
                side = [dilation * size for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
                x = torch.linspace(-1, 1, layer.in_channels * side[0] * side[1]).view(1, -1, *side).to(weight)
                expected = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
            found = probe.forward(x)  # past its hooks
        except Exception:  # whatever it needs is more than a Linear's input
            return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return found.is_meta or torch.allclose(found, expected, atol=1e-6)


def check_called(index: int, layer: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse a weight, by its full name in the layer and its module, that is not one of a Linear which is called."""
    reader: nn.Module | None = module
    if isinstance(module, nn.Linear):
        path, _, _ = name.rpartition(".")
        reader = layer.get_submodule(path.rpartition(".")[0]) if path else None
    where = f"targets: layer {index}'s {name}"
    if isinstance(reader, _READERS):
        raise ValueError(f"{where} is read by {type(reader).__name__}; adaptive are only Linears that are called")
    if isinstance(module, nn.Linear) and not is_plain(module):
        raise ValueError(f"{where} is of a {type(module).__name__}, which does more than x W^T + b")


def _matches(name: str, pattern: str) -> bool:
    """Whether a weight's full name, or its module's where the weight is a Linear's, fits the pattern."""
    module = name[: -len(".weight")] if name.endswith(".weight") else name
    return fnmatchcase(name, pattern) or fnmatchcase(module, pattern)


def _find(field: str, pattern: str, index: int, layer: nn.Module) -> list[str]:
    """Full names of one layer's weights that a target means."""
    there_are = sharable(layer)
    if names := [name for name in there_are if _matches(name, pattern)]:
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
    has = ", ".join(name.removesuffix(".weight") for name in there_are) or "none"
    raise ValueError(f"{field} matches nothing in layer {index}; weights that can be shared there: {has}")


def resolve(layers: Sequence[nn.Module], targets: Sequence[str]) -> dict[str, str]:
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
                raise ValueError(f"{field}: layer {has} has {different[0]}, layer {has_not} does not")
        for name in names:
            if name in found:
                raise ValueError(f"{field} and {found[name]!r} both mean {name}")
            found[name] = pattern
    return found


def setting(field: str, value: PerLayer | Mapping[str, PerLayer], target: str, layers: int, minimum: int) -> list[int]:
    """rank or groups of one target, one per layer."""
    if isinstance(value, Mapping):
        if target not in value:
            raise ValueError(f"{field} has no entry for target {target!r}")
        field, value = f"{field}[{target!r}]", value[target]
    try:
        return per_layer(field, value, layers, minimum)
    except ValueError as error:
        raise ValueError(str(error).replace("stages", "layers")) from error


def checked_targets(targets: str | Sequence[str]) -> Sequence[str]:
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, Sequence) or not targets:
        raise ValueError(f"targets must be one or more names, got {targets!r}")
    return targets


def checked_layers(layers: Iterable[nn.Module]) -> list[nn.Module]:
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


def groups_of(share: Sequence[int | str] | None, layers: int) -> list[list[int]]:
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


class Stack(NamedTuple):
    """Weights of one name that share with each other."""

    name: str
    target: str
    weights: dict[int, Tensor]
    """By layer."""


def stacks_of(
    layers: Sequence[nn.Module], targets: str | Sequence[str], share: Sequence[int | str] | None, adaptive: bool = False
) -> Iterator[Stack]:
    """What is to be shared, checked.

    Raises:
        ValueError: see :func:`share_stack`.
    """
    sharing = groups_of(share, len(layers))
    places = [sharable(layer) for layer in layers]
    for name, target in resolve(layers, checked_targets(targets)).items():
        for i, place in enumerate(places):
            if place[name][1] in computed_names(place[name][0]):
                raise ValueError(f"targets: layer {i}'s {name} is shared already")
            if adaptive:
                check_called(i, layers[i], name, place[name][0])
        for members in sharing:
            weights = {i: getattr(*places[i][name]) for i in members}
            check_weights(name, weights)
            yield Stack(name, target, weights)


def check_weights(name: str, weights: Mapping[int, Tensor]) -> None:
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
