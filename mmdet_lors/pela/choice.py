"""Which layers of a model are compressed, to which rank, and why others are not. Needs PyTorch alone."""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmdet_lors.lors.targets import is_plain

Layer = nn.Linear | nn.Conv2d

OMIT = ("norm", "head", "patch_embed", "downsample")
"""Parts of names that the paper's code leaves whole in every model; a model need not have all of them."""


def paper_rank(in_features: int, out_features: int, ratio: float) -> int:
    """floor(in * out / (ratio * (in + out))): the rank at which a weight keeps 1 / ratio of its parameters (3.5)."""
    return math.floor(in_features * out_features / (ratio * (in_features + out_features)))


def choose(
    model: nn.Module, omit: Sequence[str], convolutions: bool = False, warn: bool = True
) -> dict[Layer, list[str]]:
    """The layers that factors can stand in for, with each of the names under which the model holds them.

    Linears, and with ``convolutions`` ungrouped ``nn.Conv2d``. ``warn`` says which are left whole, and why.

    Raises:
        ValueError: there is none; names what the model has instead, and why.
    """
    names: dict[Layer, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or (convolutions and isinstance(module, nn.Conv2d) and module.groups == 1):
            names[module].append(name)
    if warn:
        _warn_of_unused(model, omit, names)
    chosen, omitted = {}, {}
    for layer, paths in names.items():
        if any(part in path for part in omit for path in paths):
            omitted[layer] = paths
        else:
            chosen[layer] = paths
    whole = {layer: reason for layer in chosen if (reason := why_whole(layer))}
    chosen = {layer: paths for layer, paths in chosen.items() if layer not in whole}
    strangers = {
        p: f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None and not (module in chosen and key == "weight")
    }
    whole |= {
        layer: f"it shares its weight with {strangers[layer.weight]}" for layer in chosen if layer.weight in strangers
    }
    chosen = {layer: paths for layer, paths in chosen.items() if layer not in whole}
    for layer, reason in whole.items() if warn else ():
        _warn(f"{names[layer][0]} is left whole: {reason}")
    if chosen:
        return chosen
    kind = "Linear or convolution" if convolutions else "Linear"
    number, others = _not_chosen(model, names)
    if not whole and (not others or len(omitted) > number):
        raise ValueError(f"omit leaves no {kind} to compress; the model has {_summary(names)}")
    different = "neither a Linear nor an ungrouped Conv2d" if convolutions else "not an nn.Linear"
    reasons = [f"{' and '.join(others)}: {different}"] if others else []
    reasons += [f"{names[layer][0]}: {reason}" for layer, reason in whole.items()]
    reasons += [f"{_names(omitted)}: omitted"] if omitted else []
    raise ValueError(f"the model has no {kind} to compress; {'; '.join(reasons)}")


def names_by_weight(layers: Iterable[tuple[str, nn.Module]]) -> dict[Tensor, list[str]]:
    """The names of the layers that have each weight: those that share one get the same factors."""
    found: dict[Tensor, list[str]] = defaultdict(list)
    for name, layer in layers:
        found[layer._parameters["weight"]].append(name)  # type: ignore[index]  # of every layer that is chosen
    return found


def why_whole(layer: Layer) -> str | None:
    """Why factors cannot stand in for this layer, whatever else the model has."""
    kind = type(layer).__name__
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            sources = [n for n in (*layer._parameters, *layer._buffers) if n.startswith(f"{name}_")]
            return f"its {name} is computed, {'from ' + ', '.join(sources) if sources else 'by ' + kind}"
    if nn.parameter.is_lazy(layer.weight):
        return f"{kind} has no size before its first call"
    if layer.weight._backward_hooks or layer.weight._post_accumulate_grad_hooks:
        return "its weight has hooks of its own, which two factors cannot keep"
    if "forward" in vars(layer):
        return "its forward() was replaced"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"its padding is {layer.padding_mode!r}, not zeros"
    if is_plain(layer):
        return None
    return f"{kind} does more than {'x W^T' if isinstance(layer, nn.Linear) else 'W * x'} + b"


def _not_chosen(model: nn.Module, names: Mapping[Layer, list[str]]) -> tuple[int, list[str]]:
    """How many layers hold matrices but are none of these, and which, the most frequent kind first."""
    found: dict[str, dict[nn.Module, list[str]]] = defaultdict(dict)
    for name, module in model.named_modules():
        if ".parametrizations" in f".{name}":
            continue
        own = [p for p in module._parameters.values() if p is not None and (nn.parameter.is_lazy(p) or p.dim() > 1)]
        # What is quantised has its weight in no parameter.
        if module not in names and (own or callable(getattr(module, "weight", None))):
            kind = type(module)
            found[kind.__name__ if kind.__name__ != "Linear" else f"{kind.__module__}.Linear"][module] = [name]
    kinds = sorted(found, key=lambda kind: -len(found[kind]))
    return sum(map(len, found.values())), [f"{kind} ({_names(found[kind])})" for kind in kinds]


def ranks_of(chosen: Mapping[Layer, list[str]], ratio: float | None, ranks: Mapping[str, int]) -> dict[Layer, int]:
    """The rank of every layer that gets one, checked; without a ratio only those that ``ranks`` names."""
    for key in ranks:
        if not any(key in path for paths in chosen.values() for path in paths):
            raise ValueError(f"ranks has {key!r}, which no compressed layer's name contains; they are {_names(chosen)}")
    exact = {path for paths in chosen.values() for path in paths if path in ranks}
    found: dict[Layer, int] = {}
    by_weight: dict[int, int] = {}
    for layer, paths in chosen.items():
        rows, cols = layer.weight.flatten(1).shape
        parts = [key for key in ranks if key not in exact and any(key in path for path in paths)]
        best = next((path for path in paths if path in ranks), max(parts, key=len, default=None))
        if best is not None:
            rank = ranks[best]
        elif ratio is not None:
            rank = paper_rank(cols, rows, ratio)
        else:
            continue
        field = f"ratio {ratio}" if best is None else f"ranks[{best!r}]"
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ValueError(f"{field} must be an integer, got {rank!r}")
        if rank < 1:
            raise ValueError(f"{field} leaves {paths[0]} ({rows} x {cols}) rank {rank}: lower the ratio or omit it")
        if rank * (rows + cols) > rows * cols:
            raise ValueError(
                f"{field} makes {paths[0]} ({rows} x {cols}) larger: rank {rank} has {rank * (rows + cols)} parameters "
                f"instead of {rows * cols}; at most {paper_rank(cols, rows, 1)} is smaller"
            )
        if by_weight.setdefault(id(layer.weight), rank) != rank:
            raise ValueError(f"{field} gives {paths[0]} another rank than the layer that it shares its weight with")
        found[layer] = rank
    return found


def _names(layers: Mapping[Any, list[str]]) -> str:
    """Names of layers, those that differ by a number alone as one."""
    patterns = dict.fromkeys(re.sub(r"\d+", "*", paths[0]) for paths in layers.values())
    return ", ".join(patterns)


def _summary(names: Mapping[Layer, list[str]]) -> str:
    kinds = dict.fromkeys(f"{type(layer).__name__}s" for layer in names)
    return f"the {' and '.join(kinds)} {_names(names)}" if names else "no Linear"


def _warn_of_unused(model: nn.Module, omit: Sequence[str], names: Mapping[Layer, list[str]]) -> None:
    modules = [name for name, _ in model.named_modules()]
    for part in omit:
        if part not in OMIT and not any(part in name for name in modules):
            _warn(f"omit has {part!r}, which no name of the model contains; it has {_summary(names)}")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
