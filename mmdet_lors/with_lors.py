"""Adds LORS to any registered model, from its config."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import nn

from mmdet_lors.lors.stack import initial_stack, share_stack
from mmdet_lors.lors.warm_start import FitError

from .errors import UserError

FIELDS = ("layers", "targets", "rank", "groups", "share", "init", "turns", "kind", "condition")


@MODELS.register_module("WithLORS")
def with_lors(model: dict, stacks: Sequence[dict]) -> nn.Module:
    """Build a model, and replace the weights that ``stacks`` names by LORST, or Linears by LORSA.

    The model itself is returned, so that runner, hooks and parameter names see no wrapper around it. Its
    ``init_weights()`` first initialises the plain model, pre-trained weights included, and then shares the result; a
    model that loads its weights while it is built needs no ``init_weights()``.

    Args:
        model: config of any registered model.
        stacks: per stack a dict of ``layers``, a dotted name of an ``nn.ModuleList`` or ``nn.Sequential`` in the
            model, or a list of names of its layers, and of the arguments of
            :func:`mmdet_lors.lors.share_stack`: ``targets``, ``rank``, ``groups``, ``share``, ``init``, ``turns``,
            ``kind``, ``condition``; the equations and their source are there.

    Raises:
        UserError: names the stack, the field, and what is wrong with it.
    """
    if not isinstance(stacks, Sequence) or isinstance(stacks, str) or not stacks:
        raise UserError(f"stacks must be a list of one dict or more, got {stacks!r}")
    for i, stack in enumerate(stacks):
        _check_fields(f"stacks[{i}]", stack)
    # A copy: mmdet's DETRs write into their config, which could not be built again.
    built = MODELS.build(deepcopy(model))
    for i, stack in enumerate(stacks):
        settings = dict(stack)
        layers = layers_of(f"stacks[{i}].layers", built, settings.pop("layers"))
        try:
            report = share_stack(layers, **settings)
        except ValueError as error:
            raise UserError(f"stacks[{i}].{error}") from error
        _log({f"stacks[{i}] {name}": errors for name, errors in report.items()})
    if hasattr(built, "init_weights"):
        # Not a bound method, which is pickled by a name that the model does not have.
        built.init_weights = partial(_init_weights, built)
    return built


def _init_weights(self: nn.Module, *args, **kwargs) -> None:
    """Run the model's own ``init_weights()`` on its plain weights, then initialise LORS from them."""
    with initial_stack([self]) as report:
        # An enclosing mmengine module lists all parameters first, and refuses those that it does not know.
        known = getattr(self, "_params_init_info", None)
        if known is not None:
            for parameter in self.parameters():
                known.setdefault(parameter, dict(init_info="", tmp_mean_value=parameter.detach().mean().cpu()))
        type(self).init_weights(self, *args, **kwargs)
    _log(report)


def _check_fields(where: str, stack: Any) -> None:
    if not isinstance(stack, Mapping):
        raise UserError(f"{where} must be a dict, got {stack!r}")
    if unknown := [field for field in stack if field not in FIELDS]:
        raise UserError(f"{where} has no field {unknown[0]!r}; its fields are {', '.join(FIELDS)}")
    for field in ("layers", "targets"):
        if field not in stack:
            raise UserError(f"{where}.{field} is missing")


def layers_of(field: str, model: nn.Module, names: str | Sequence[str]) -> list[nn.Module]:
    """The layers of a model that a config or a command line names.

    Args:
        field: how that calls them, for messages.
        model: has them.
        names: the dotted name of an ``nn.ModuleList`` or ``nn.Sequential``, or a list of names of layers.

    Raises:
        UserError: there is nothing of such a name, or it is no list of layers.
    """
    found = [_submodule(field, model, name) for name in ([names] if isinstance(names, str) else names)]
    if not isinstance(names, str):
        return found
    if not isinstance(found[0], nn.ModuleList | nn.Sequential):
        raise UserError(f"{field} {names!r} is a {type(found[0]).__name__}, not an nn.ModuleList of layers")
    return list(found[0])


def _submodule(field: str, model: nn.Module, name: str) -> nn.Module:
    module = model
    for part in str(name).split("."):
        children = dict(module.named_children())
        if part not in children:
            has = ", ".join(list(children)[:8]) or "nothing below it"
            raise UserError(f"{field} {name!r}: {type(module).__name__} has no {part!r}; it has {has}")
        module = children[part]
    return module


def _log(report: dict[str, list[FitError]]) -> None:
    for name, errors in report.items():
        shared, fitted = (", ".join(f"{error[i]:.3f}" for error in errors) for i in (0, 1))
        print_log(f"LORS {name}: relative error per layer {fitted} (W_shared alone {shared})", logger="current")
