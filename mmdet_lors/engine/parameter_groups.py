"""Few groups of parameters: an optimizer takes a step group by group."""

from typing import Any

from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergingOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, but parameters with equal settings share a group.

    With a ``paramwise_cfg`` mmengine gives every parameter a group of its own, and a fused step becomes as many. The
    weights that result are the same.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", *args: Any, **kwargs: Any) -> None:
        """Append the groups of a module and of those below it; of the whole model, merge them.

        Args:
            params: what the groups are added to, in place.
            module: the module.
            prefix: its name; empty for the model.
            *args: mmengine's own.
            **kwargs: mmengine's own.
        """
        super().add_params(params, module, prefix, *args, **kwargs)
        if prefix:
            return
        merged: dict[tuple, dict] = {}
        for group in params:
            settings = {name: value for name, value in group.items() if name != "params"}
            merged.setdefault(tuple(settings.items()), dict(settings, params=[]))["params"] += group["params"]
        params[:] = merged.values()


def merge_groups(cfg: Config, resumed: dict | None) -> None:
    """Set :class:`MergingOptimWrapperConstructor` where there is a ``paramwise_cfg``, unless a constructor is named.

    Args:
        cfg: the run's; changed in place.
        resumed: the checkpoint that it goes on from. One in which each parameter has its own group needs them again.
    """
    groups = ((resumed or {}).get("optimizer") or {}).get("param_groups", [])
    one_each = len(groups) > 1 and all(len(group["params"]) == 1 for group in groups)
    if cfg.optim_wrapper.get("paramwise_cfg") and not one_each:
        cfg.optim_wrapper.setdefault("constructor", MergingOptimWrapperConstructor.__name__)
