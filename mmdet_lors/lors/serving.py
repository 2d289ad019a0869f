"""Serving a stack folded: its plain weights are kept in memory beside the parameters, which nobody touches."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdet_lors.transfer import ToHost


class Fingerprint(NamedTuple):
    """Shows whether tensors have changed since it was taken."""

    kinds: list[tuple]
    """Device, data type, shape and version of each."""
    sketch: Tensor
    """The product of every row with one fixed vector: it sees writes that versions do not."""

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Fingerprint":
        """Take it: one matrix-vector product per tensor."""
        tensors = list(tensors)
        longest = max(t.shape[-1] if t.dim() else 1 for t in tensors)
        vector = torch.arange(1, longest + 1, device=tensors[0].device, dtype=torch.float32).cos()
        kinds, products = [], []
        for t in tensors:
            kinds.append((t.device, t.dtype, t.shape, None if t.is_inference() else t._version))
            rows = t.reshape(-1, t.shape[-1]) if t.dim() else t.reshape(1, 1)
            dtype = torch.promote_types(t.dtype, torch.float32)
            products.append(rows.to(dtype) @ vector[: rows.shape[1]].to(dtype))
        return cls(kinds, torch.cat(products))


class Served(NamedTuple):
    """What all layers of one pass serve with."""

    layers: list
    """Tensors of every layer: see :meth:`Servable.fold_for_serving`."""
    differs: ToHost | None
    """Whether the weights are others than those that were folded; None where they were folded just now."""


class Servable(nn.Module):
    """A stack of ``num_layers`` layers whose low-rank parts can be folded away while it serves.

    Folded weights are neither parameters nor buffers, and are in no state dict and no pickle. They are never older than
    the parameters: every pass compares the :class:`Fingerprint` of the parameters with the one taken when they were
    folded, and folds again where they differ. Version counters see writes in place, optimizer steps and loaded state
    dicts, to the last bit. The sketch sees what has no version: writes through ``.data`` (mmengine's EMA), NumPy or
    another process. It may miss such a write where it is lost in rounding, below about 1e-6 of a row's norm. The
    comparison reads the parameters once a pass, and a decoder's pass whose weights turn out to be old is done again.

    Passes that may need gradients of the parameters, and those that are traced, compiled, exported or captured, do not
    use the folded weights: they read the parameters.
    """

    num_layers: int
    fold: Callable[[int], Any]
    """A layer's plain weights."""

    def __init__(self) -> None:
        super().__init__()
        self.serving = False
        self._folded: tuple[Fingerprint, list] | None = None

    def fold_for_serving(self, layer: int) -> Any:
        """What layer i serves with, tensors only: the layer folded, unless a class needs it otherwise."""
        return self.fold(layer)

    def serve(self, mode: bool = True) -> "Servable":
        """Serve folded from now on until ``train()``, or drop what was folded."""
        self.serving, self._folded = mode, None
        return self

    def _served(self) -> Served | None:
        """What was folded, if of tensors of the same versions; else folds now."""
        sources = [*self.parameters(), *self.buffers()]
        if not self.serving or any(t.is_meta for t in sources):
            return None
        # Out of whatever mode the caller is in: what is folded outlives it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(sources[0].device.type, enabled=False):
            now = Fingerprint.of(sources)
            kept = self._folded
            if kept is not None and kept[0].kinds == now.kinds:
                return Served(kept[1], ToHost((now.sketch != kept[0].sketch).any()))
            layers = [self.fold_for_serving(i) for i in range(self.num_layers)]
            self._folded = now, layers
        return Served(layers, None)

    def outdated(self, served: Served | None) -> bool:
        """Whether a pass went by older weights, which are then dropped: it has to be done again.

        Asked when the device has been given all of the pass, so that it computes while the host waits for the answer.
        """
        if served is None or served.differs is None or not served.differs.read():
            return False
        self._folded = None
        return True

    @property
    def folded(self) -> list | None:
        """What every layer serves with, of the weights as they are now; None for a stack that does not serve."""
        served = self._served()
        while self.outdated(served):
            served = self._served()
        return served and served.layers

    def _may_serve(self) -> bool:
        """Whether this pass may use what is folded: see above."""
        if not self.serving or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        parameters = list(self.parameters())
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return False
        return not (parameters[0].is_cuda and torch.cuda.is_current_stream_capturing())

    def for_layer(self) -> list | None:
        """:attr:`folded` where this pass may use it; else None."""
        return self.folded if self._may_serve() else None

    def for_pass(self) -> Served | None:
        """For a caller that goes through all layers, and again if they were :meth:`outdated`; None as in for_layer."""
        return self._served() if self._may_serve() else None

    def train(self, mode: bool = True) -> "Servable":
        if mode:
            self.serve(False)
        return super().train(mode)

    def __getstate__(self) -> dict:
        return dict(super().__getstate__(), _folded=None)


def serve(model: nn.Module, mode: bool = True) -> nn.Module:
    """Switch every :class:`Servable` part of a model to folded weights, or back; its parameters stay as they are."""
    for module in model.modules():
        if isinstance(module, Servable):
            module.serve(mode)
    return model
