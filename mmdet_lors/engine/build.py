"""Building a model without its weights: to check a config, or to count."""

from copy import deepcopy

from mmdet.registry import MODELS
from torch import nn
from torch.overrides import TorchFunctionMode

from mmdet_lors.errors import UserError


class _SkipInitialisation(TorchFunctionMode):
    """Leaves new parameters as they come out of the allocator: their values are never read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


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
