"""Weights that are computed when they are read: reading is like reading a parameter, writing says what to do."""

import copy
from collections.abc import Iterator
from typing import SupportsIndex

import torch
from torch import Tensor, nn

_WRITES = {"__set__", "__delete__", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "set_"}
"""What would change a parameter, or attach something to it, without a new version of its values."""


class ComputedWeightError(RuntimeError):
    """A write into a weight that is computed, which would be lost."""


class ComputedWeight(Tensor):
    """A weight as it was computed now. What comes of it is an ordinary tensor; its views refuse writes as it does."""

    remedy: str

    @classmethod
    def of(cls, weight: Tensor, remedy: str) -> Tensor:
        """The same tensor, with ``remedy`` as its error message; a parameter stays one, since it can be written to."""
        if isinstance(weight, nn.Parameter) or torch.compiler.is_compiling():
            return weight
        computed = weight.as_subclass(cls)
        computed.remedy = remedy
        return computed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            ours = [(t, t._version) for t in _tensors((args, kwargs)) if isinstance(t, cls) and not t.is_inference()]
            if func.__name__ in _WRITES and isinstance(args[0], cls):
                raise ComputedWeightError(args[0].remedy)
            result = func(*args, **kwargs)
            for t, version in ours:
                if t._version != version:
                    raise ComputedWeightError(t.remedy)
            return _guarded(result, [t for t, _ in ours])

    def _plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        return self._plain().__reduce_ex__(protocol)


def _tensors(value: object) -> Iterator[Tensor]:
    """Those in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _guarded(result: object, sources: list[ComputedWeight]) -> object:
    """What shares memory with a computed weight refuses writes, too."""
    if isinstance(result, list | tuple) and type(result) in (list, tuple):
        return type(result)(_guarded(item, sources) for item in result)
    if isinstance(result, Tensor):
        for source in sources:
            if result.untyped_storage()._cdata == source.untyped_storage()._cdata:
                return ComputedWeight.of(result, source.remedy)
    elif sources and hasattr(result, "setflags"):
        result.setflags(write=False)
    return result


class computed_weight(property):  # noqa: N801, used as ``property`` is
    """A weight that is computed by ``self.<by>()``; a write into it raises an error that says ``remedy``."""

    def __init__(self, by: str, remedy: str) -> None:
        def get(module: nn.Module) -> Tensor:
            return ComputedWeight.of(getattr(module, by)(), remedy)

        def refuse(module: nn.Module, value: object) -> None:
            raise ComputedWeightError(remedy)

        super().__init__(get, refuse)


class ComputesWeights(nn.Module):
    """A module some of whose weights are :class:`computed_weight`."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what ``module.weight = nn.Parameter(...)`` does."""
        computed = getattr(type(self), name, None)
        if isinstance(computed, computed_weight):
            computed.__set__(self, param)
        super().register_parameter(name, param)
