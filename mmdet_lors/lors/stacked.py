"""One layer's weight in a stack that shares, and how it takes the place of a module's own."""

from functools import cache

import torch
from torch import Tensor, nn

from .computed import ComputesWeights, computed_weight
from .static import LORST

SUFFIX = "_lorst"
"""``module.<name>_lorst`` computes ``module.<name>``."""


class StackedWeight(nn.Module):
    r"""One layer's weight in a stack, :math:`W_i = W^{shared} + \sum_k B_i^k A_i^k`, (out, in).

    The first layer of those that share holds W_shared. The others find it through the first one's module, which is no
    child of theirs: so it has one name in ``state_dict()`` and ``parameters()``, and follows every copy, move and load.

    Args:
        lorst: where W_shared, B_i and A_i are taken from.
        position: i, the layer's place among those that share.
        first: the first layer's; None for the first itself.
        init: see :func:`share_stack`; the first keeps it for :func:`plain_stack`.
        turns: likewise.
    """

    shared: nn.Parameter
    _first: "StackedWeight | None"
    layer_base: type = ComputesWeights
    """What a module becomes whose weight this is."""

    def __init__(self, lorst: LORST, position: int, first: "StackedWeight | None", init: str, turns: int) -> None:
        super().__init__()
        self.private = lorst.private[position]
        self.position = position
        # Past nn.Module, which would make it a child.
        object.__setattr__(self, "_first", first)
        if first is None:
            assert lorst.shared is not None
            self.shared, self.sharing, self.init, self.turns = lorst.shared, lorst.num_layers, init, turns

    @property
    def first(self) -> "StackedWeight":
        """The one that holds W_shared."""
        return self if self._first is None else self._first

    @property
    def rank(self) -> int:
        """K_i * r_i."""
        return 0 if self.private is None else len(self.private.A)

    def forward(self) -> Tensor:
        """W_i, (out, in)."""
        shared = self.shared if self._first is None else self._first.shared
        # One kernel for W_shared + B A; under autocast it also casts.
        return shared if self.private is None else torch.addmm(shared, self.private.B, self.private.A)

    def plain(self) -> Tensor:
        """What the layer has as its weight when it is plain, (out, in)."""
        return self()

    def extra_repr(self) -> str:
        return f"position={self.position}, rank={self.rank}, holds_shared={self._first is None}"


@cache
def computed_class(plain: type, names: tuple[str, ...], base: type = ComputesWeights) -> type[nn.Module]:
    """A subclass of ``base`` and ``plain`` that computes the named weights instead of storing them.

    As ``torch.nn.utils.parametrize`` does, but with one class per kind of module, which is never changed afterwards.
    parametrize changes a class that a module has in common with its copies: folding a copy breaks the original.
    """

    def computed(name: str) -> property:
        remedy = f"{name} is computed, W_shared + B A: write within plain_stack(layers), or to {name}{SUFFIX}"
        return computed_weight(name + SUFFIX, getattr(base, "remedy", remedy))

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        # Copying and pickling: the class has no name to be imported by.
        return _new, (plain, names, base), self.__getstate__()

    body = dict(__reduce_ex__=__reduce_ex__, __module__=__name__, plain_class=plain, computed_weights=names)
    return type(f"Stacked{plain.__name__}", (base, plain), body | {name: computed(name) for name in names})


def _new(plain: type, names: tuple[str, ...], base: type = ComputesWeights) -> nn.Module:
    kind = computed_class(plain, names, base)
    return kind.__new__(kind)


def computed_names(module: nn.Module) -> tuple[str, ...]:
    """The weights of this module that are computed."""
    return getattr(type(module), "computed_weights", ())


def _set_names(module: nn.Module, names: tuple[str, ...], base: type = ComputesWeights) -> None:
    plain: type = getattr(type(module), "plain_class", type(module))
    module.__class__ = computed_class(plain, names, base) if names else plain


def attach(module: nn.Module, name: str, weight: StackedWeight) -> None:
    """Compute ``module.<name>`` from now on."""
    delattr(module, name)
    module.add_module(name + SUFFIX, weight.train(module.training))
    _set_names(module, (*computed_names(module), name), weight.layer_base)


@torch.no_grad()
def detach(module: nn.Module, name: str) -> None:
    """Store ``module.<name>`` again: an ordinary parameter with the value that ``plain()`` has now."""
    weight: StackedWeight = getattr(module, name + SUFFIX)
    trained = weight.first.shared if weight.private is None else weight.private.B
    value = nn.Parameter(weight.plain().clone(), requires_grad=trained.requires_grad)
    delattr(module, name + SUFFIX)
    _set_names(module, tuple(n for n in computed_names(module) if n != name))
    # Before the bias, as in a module that was never shared.
    others = list(module.named_parameters(recurse=False))
    module.register_parameter(name, value)
    for other, parameter in others:
        delattr(module, other)
        module.register_parameter(other, parameter)
