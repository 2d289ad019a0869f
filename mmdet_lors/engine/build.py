"""Builds a model without its weights, to check a config or to count parameters and operations."""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar

from mmdet.registry import MODELS, TASK_UTILS
from mmengine.model import is_model_wrapper
from torch import nn
from torch.overrides import TorchFunctionMode

from mmdet_lors.engine.config_check.signatures import fields_of, meant
from mmdet_lors.errors import UserError

from .new_style import type_name

_P, _T = ParamSpec("_P"), TypeVar("_T")
_building = RLock()


def bare(model: nn.Module) -> nn.Module:
    """The model without what wraps it for distributed training."""
    return model.module if is_model_wrapper(model) else model


def one_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator: threads take turns in all functions that have it, which read configs or build from them.

    mmengine keeps the default scope, ``sys.path`` and the modules of the config being read per process.
    """

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _building:
            return function(*args, **kwargs)

    return alone


class _SkipInitialisation(TorchFunctionMode):
    """Leaves new parameters uninitialised, since their values are never read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


@one_at_a_time
def build_without_weights(model_cfg: dict) -> nn.Module:
    """Build the model of this config on the meta device, with names and shapes but no values.

    Raises:
        UserError: a name in the config is not registered, or its class does not have one of the fields.
    """
    try:
        with _SkipInitialisation():
            # A copy: mmdet's DETRs write into their config, which could not be built again.
            # Not torch.device("meta"): Swin reads values of small tensors while it is built.
            return MODELS.build(deepcopy(model_cfg)).to("meta")
    except (KeyError, TypeError) as error:
        reason = str(error.args[0]).splitlines()[0] if error.args else type(error).__name__
        raise UserError(_unknown(reason, model_cfg) or f"config's model cannot be built: {reason}") from error


def _unknown(reason: str, model_cfg: dict) -> str | None:
    """The place of an unknown field or type in a model's config, with the nearest known name."""
    if match := re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", reason):
        for where, node in _nodes(model_cfg, "model"):
            kind = _kind(node["type"])
            names = {base.__name__ for base in getattr(kind, "__mro__", [kind]) if base}
            if match[2] in node and match[1] in names:
                known = meant(match[2], fields_of(kind).names)
                return f"{where}.{match[2]}: {type_name(node['type'])} has no such field{known}"
    if match := re.match(r"(\S+) is not in the (\S+)::(.+?) registry", reason):
        for where, node in _nodes(model_cfg, "model"):
            if node["type"] == match[1]:
                names = set(MODELS.module_dict) | set(TASK_UTILS.module_dict) | set(MODELS.parent.module_dict)
                return f"{where}.type: {match[0]}{meant(match[1], names)}"
    return None


def _nodes(node: Any, where: str) -> Iterator[tuple[str, dict]]:
    """(place, config) of everything in a model's config that has a type."""
    if isinstance(node, dict):
        if "type" in node:
            yield where, node
        for key, value in node.items():
            yield from _nodes(value, f"{where}.{key}")
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _nodes(value, f"{where}[{i}]")


def _kind(name: Any) -> Any:
    return MODELS.get(name) or TASK_UTILS.get(name) if isinstance(name, str) else name
