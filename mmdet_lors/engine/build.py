"""Building a model without its weights: to check a config, or to count."""

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar

from mmdet.registry import MODELS
from torch import nn
from torch.overrides import TorchFunctionMode

from mmdet_lors.errors import UserError

_P, _T = ParamSpec("_P"), TypeVar("_T")
_building = RLock()


def one_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Lets threads take turns in all functions that have this: they read configs or build what these name.

    mmengine keeps the default scope, ``sys.path`` and the modules of a config that it reads per process.
    """

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _building:
            return function(*args, **kwargs)

    return alone


class _SkipInitialisation(TorchFunctionMode):
    """Leaves new parameters as they come out of the allocator: their values are never read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


@one_at_a_time
def build_without_weights(model_cfg: dict) -> nn.Module:
    """The model of this config on the meta device: names and shapes alone.

    Raises:
        UserError: what the config names is not registered, or a field that its class does not have.
    """
    try:
        with _SkipInitialisation():
            # A copy: mmdet's DETRs write into their config, which could not be built again.
            # Not torch.device("meta"): Swin reads values of small tensors while it is built.
            return MODELS.build(deepcopy(model_cfg)).to("meta")
    except (KeyError, TypeError) as error:
        reason = str(error.args[0]).splitlines()[0] if error.args else type(error).__name__
        raise UserError(f"config's model cannot be built: {reason}") from error
