"""Which Linears of a model are compressed, to which rank, and why others are not. Needs PyTorch alone."""

import copy
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OMIT = ("norm", "head", "patch_embed", "downsample")
"""Parts of names that the paper's code leaves whole in every model; a model need not have all of them."""


def paper_rank(in_features: int, out_features: int, ratio: float) -> int:
    """floor(in * out / (ratio * (in + out))): the rank at which a weight keeps 1 / ratio of its parameters (3.5)."""
    return math.floor(in_features * out_features / (ratio * (in_features + out_features)))


def is_plain(linear: nn.Linear) -> bool:
    """Whether calling this layer is x W^T + b: a subclass may do more, which is found by asking it."""
    if type(linear).forward is nn.Linear.forward:
        return True
    probe = copy.deepcopy(linear)
    weight, bias = probe.weight, probe.bias
    with torch.no_grad():
        # Its own weights may not be there yet.
        for p in (weight, bias):
            if p is not None:
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        x = torch.linspace(-1, 1, 2 * linear.in_features).view(2, -1).to(weight)
        try:
            found, expected = probe.forward(x), F.linear(x, weight, bias)  # past its hooks
        except Exception:  # whatever it needs is more than a Linear's input
            return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return found.is_meta or torch.allclose(found, expected, atol=1e-6)


def choose(model: nn.Module, omit: Sequence[str]) -> dict[nn.Linear, list[str]]:
    """The Linears that factors can stand in for, with each of the names under which the model holds them.

    Raises:
        ValueError: there is none; names what the model has instead, and why.
    """
    names: dict[nn.Linear, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names[module].append(name)
    _warn_of_unused(model, omit, names)
    chosen, omitted = {}, {}
    for linear, paths in names.items():
        if any(part in path for part in omit for path in paths):
            omitted[linear] = paths
        else:
            chosen[linear] = paths
    whole = {linear: reason for linear in chosen if (reason := _why_whole(linear))}
    chosen = {linear: paths for linear, paths in chosen.items() if linear not in whole}
    strangers = {
        p: f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None and not (module in chosen and key == "weight")
    }
    whole |= {
        linear: f"it shares its weight with {strangers[linear.weight]}"
        for linear in chosen
        if linear.weight in strangers
    }
    chosen = {linear: paths for linear, paths in chosen.items() if linear not in whole}
    for linear, reason in whole.items():
        _warn(f"{names[linear][0]} is left whole: {reason}")
    if chosen:
        return chosen
    number, others = _not_linear(model)
    if not whole and (not others or len(omitted) > number):
        raise ValueError(f"omit leaves no Linear to compress; the model has {_summary(names)}")
    reasons = [f"{' and '.join(others)}: not an nn.Linear"] if others else []
    reasons += [f"{names[linear][0]}: {reason}" for linear, reason in whole.items()]
    reasons += [f"{_names(omitted)}: omitted"] if omitted else []
    raise ValueError(f"the model has no Linear to compress; {'; '.join(reasons)}")


def _why_whole(linear: nn.Linear) -> str | None:
    """Why factors cannot stand in for this layer, whatever else the model has."""
    kind = type(linear).__name__
    for name in ("weight", "bias"):
        if name not in linear._parameters:
            sources = [n for n in (*linear._parameters, *linear._buffers) if n.startswith(f"{name}_")]
            return f"its {name} is computed, {'from ' + ', '.join(sources) if sources else 'by ' + kind}"
    if nn.parameter.is_lazy(linear.weight):
        return f"{kind} has no size before its first call"
    if linear.weight._backward_hooks or linear.weight._post_accumulate_grad_hooks:
        return "its weight has hooks of its own, which two factors cannot keep"
    if "forward" in vars(linear):
        return "its forward() was replaced"
    return None if is_plain(linear) else f"{kind} does more than x W^T + b"


def _not_linear(model: nn.Module) -> tuple[int, list[str]]:
    """How many layers hold matrices but are not Linears, and which, the most frequent kind first."""
    found: dict[str, dict[nn.Module, list[str]]] = defaultdict(dict)
    for name, module in model.named_modules():
        if ".parametrizations" in f".{name}":
            continue
        own = [p for p in module._parameters.values() if p is not None and (nn.parameter.is_lazy(p) or p.dim() > 1)]
        # What is quantised has its weight in no parameter.
        if not isinstance(module, nn.Linear) and (own or callable(getattr(module, "weight", None))):
            kind = type(module)
            found[kind.__name__ if kind.__name__ != "Linear" else f"{kind.__module__}.Linear"][module] = [name]
    kinds = sorted(found, key=lambda kind: -len(found[kind]))
    return sum(map(len, found.values())), [f"{kind} ({_names(found[kind])})" for kind in kinds]


def ranks_of(chosen: Mapping[nn.Linear, list[str]], ratio: float, ranks: Mapping[str, int]) -> dict[nn.Linear, int]:
    """Every layer's rank, checked."""
    for key in ranks:
        if not any(key in path for paths in chosen.values() for path in paths):
            raise ValueError(f"ranks has {key!r}, which no compressed layer's name contains; they are {_names(chosen)}")
    found: dict[nn.Linear, int] = {}
    by_weight: dict[int, int] = {}
    for linear, paths in chosen.items():
        rows, cols = linear.weight.shape
        best = max((key for key in ranks if any(key in path for path in paths)), key=len, default=None)
        rank = paper_rank(cols, rows, ratio) if best is None else ranks[best]
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
        if by_weight.setdefault(id(linear.weight), rank) != rank:
            raise ValueError(f"{field} gives {paths[0]} another rank than the layer that it shares its weight with")
        found[linear] = rank
    return found


def _names(layers: Mapping[Any, list[str]]) -> str:
    """Names of layers, those that differ by a number alone as one."""
    patterns = dict.fromkeys(re.sub(r"\d+", "*", paths[0]) for paths in layers.values())
    return ", ".join(patterns)


def _summary(names: Mapping[nn.Linear, list[str]]) -> str:
    return f"the Linears {_names(names)}" if names else "no Linear"


def _warn_of_unused(model: nn.Module, omit: Sequence[str], names: Mapping[nn.Linear, list[str]]) -> None:
    modules = [name for name, _ in model.named_modules()]
    for part in omit:
        if part not in OMIT and not any(part in name for name in modules):
            _warn(f"omit has {part!r}, which no name of the model contains; it has {_summary(names)}")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
