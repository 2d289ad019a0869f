"""What trains: optimizer and schedules of a config."""

from copy import deepcopy
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS

from mmdet_lors.engine.parameter_groups import MergingOptimWrapperConstructor
from mmdet_lors.errors import UserError

from .pipelines import is_known
from .signatures import bind, check_node, find, meant, nearest, said_of

PARAMWISE = {
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "flat_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
}
"""Keys that DefaultOptimWrapperConstructor reads in its paramwise_cfg; it ignores all others."""


def check_optimizer(wrapper: Any) -> None:
    """Check the optimizer, what wraps and what constructs it."""
    where = "optim_wrapper"
    if not isinstance(wrapper, dict):
        return
    constructor = wrapper.get("constructor", "DefaultOptimWrapperConstructor")
    kind = find(constructor, OPTIM_WRAPPER_CONSTRUCTORS, where, "constructor")
    default = kind in (DefaultOptimWrapperConstructor, MergingOptimWrapperConstructor)
    if not default and not isinstance(wrapper.get("optimizer"), dict):
        return  # one of several optimizers, which only the constructor knows
    named = ("constructor", "paramwise_cfg")
    check_node(wrapper, where, OPTIM_WRAPPERS, "OptimWrapper", supplied=("optimizer",), named=named)
    if "optimizer" not in wrapper:
        raise UserError(f"{where} has no optimizer")
    optimizer = check_node(wrapper["optimizer"], f"{where}.optimizer", OPTIMIZERS, supplied=("params",))
    if optimizer is not None and is_known(optimizer):
        with said_of(f"{where}.optimizer"):
            OPTIMIZERS.build(dict(deepcopy(wrapper["optimizer"]), params=[torch.nn.Parameter(torch.zeros(1))]))
    clip = wrapper.get("clip_grad")
    if isinstance(clip, dict):
        functions = dict(norm=torch.nn.utils.clip_grad_norm_, value=torch.nn.utils.clip_grad_value_)
        if (by := clip.get("type", "norm")) not in functions:
            raise UserError(f"{where}.clip_grad.type must be 'norm' or 'value', got {by!r}")
        bind(functions[by], clip, f"{where}.clip_grad", supplied=("parameters",))
    if default:
        for key in wrapper.get("paramwise_cfg") or {}:
            if key not in PARAMWISE:
                raise UserError(f"{where}.paramwise_cfg.{key}: nothing reads it{meant(key, PARAMWISE)}")
        for name, keys in ((wrapper.get("paramwise_cfg") or {}).get("custom_keys") or {}).items():
            for key in keys:
                if key not in ("lr_mult", "decay_mult") and (near := nearest(key, ("lr_mult", "decay_mult"))):
                    raise UserError(f"{where}.paramwise_cfg.custom_keys.{name}.{key}: did you mean {near}?")


def check_schedulers(schedulers: Any) -> None:
    """Check the schedules of learning rate and momentum: one, a list, or a list for each of several optimizers."""
    if not schedulers:
        return
    if isinstance(schedulers, dict) and "type" not in schedulers:
        for name, own in schedulers.items():
            _check_scheduler_list(own, f"param_scheduler.{name}")
    else:
        _check_scheduler_list(schedulers, "param_scheduler")


def _check_scheduler_list(schedulers: Any, where: str) -> None:
    single = isinstance(schedulers, dict)
    for i, scheduler in enumerate([schedulers] if single else schedulers):
        place = where if single else f"{where}[{i}]"
        named = ("convert_to_iter_based", "epoch_length")
        kind = check_node(scheduler, place, PARAM_SCHEDULERS, supplied=("optimizer",), named=named)
        if kind is None or not is_known(kind):
            continue
        settings = {key: value for key, value in deepcopy(scheduler).items() if key not in named}
        # If the config has no end, a run gives its own length.
        settings["optimizer"] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        settings["end"] = settings.get("end", 10**9)
        with said_of(place):
            PARAM_SCHEDULERS.build(settings)
