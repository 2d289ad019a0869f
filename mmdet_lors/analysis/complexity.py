"""Parameters and multiply-adds of a detector, by part and, inside the decoder, by component.

The forward pass runs on the meta device: shapes only, no arithmetic, no weights in memory. Two numbers are kept apart:

- **products**: multiply-adds of convolutions, matrix products and attention; (a x b) times (b x c) has a b c.
- **elements**: everything else that computes: 2 for each element that a norm writes (normalise; scale and shift),
  4 for each that bilinear sampling writes, 1 for each that an activation, a sum or any other elementwise operation
  writes; a reduction counts what it reads. Views, copies, and the bias inside a product are free.

**Multiply-adds** are their sum. Object detection papers call it FLOPs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch.nn.functional as F
from mmcv.ops import deform_conv, modulated_deform_conv
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmdet_lors.adamixer import QueryBased
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.errors import UserError

PARTS = {"backbone": "backbone", "neck": "neck", "query_generator": "queries", "decoder": "decoder"}
"""Attribute of the detector -> what the report calls it."""

COMPONENTS = {
    "LORSA shared": r"lorsa\.shared\b",
    "LORSA private": r"lorsa\b",
    "LORST private": r"lorst\.(private|bias)\b",
    "LORST shared": r"lorst\b",
    "own generators": r"stages\.\d+\.mixing\.parameter_generator\b",
    "own output projections": r"stages\.\d+\.mixing\.out_proj\b",
    "norms": r"stages\.\d+\.(attention_norm|ffn_norm|mixing\.norm)\b",
    "mixing (ACM, ASM)": r"stages\.\d+\.mixing\b",
    "attention": r"stages\.\d+\.attention\b",
    "offsets": r"stages\.\d+\.sampling\.offset\b",
    "3D sampling": r"stages\.\d+\.sampling\b",
    "FFN": r"stages\.\d+\.ffn\b",
    "heads": r"stages\.\d+\.(cls|reg)_branch\b",
    "refinement": r"",
}
"""Component of the decoder -> names of its modules and parameters; the first that matches counts.

LORSA's sum (shared + private) is part of the private path's cost. The per-stage biases of LORST are private.
"""

_aten = torch.ops.aten
_FREE = {_aten.clone, _aten.copy_, _aten._to_copy, _aten.fill, _aten.fill_, _aten.zero_}
_NORMS = {_aten.native_batch_norm, _aten.native_layer_norm, _aten.native_group_norm, _aten._native_batch_norm_legit}
_NORMS |= {_aten._native_batch_norm_legit_no_training, _aten.cudnn_batch_norm, _aten.miopen_batch_norm}
_READS = {_aten.mean, _aten.sum, _aten.amax, _aten.amin, _aten.var_mean, _aten.linalg_vector_norm}
_WRITES = {_aten._softmax, _aten._safe_softmax, _aten._log_softmax, _aten.max_pool2d_with_indices, _aten.avg_pool2d}


@dataclass
class Cost:
    """The cost of one part: numbers of parameters, and operations for one image."""

    parameters: int = 0
    trainable: int = 0
    products: int = 0
    elements: int = 0

    @property
    def multiply_adds(self) -> int:
        """Products and elements together."""
        return self.products + self.elements

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.trainable + other.trainable,
            self.products + other.products,
            self.elements + other.elements,
        )

    def as_dict(self) -> dict[str, int]:
        """All five numbers."""
        return {**vars(self), "multiply_adds": self.multiply_adds}


@dataclass
class Report:
    """Costs of a detector at one input size."""

    num_queries: int
    size: tuple[int, int] | None
    """(W, H) in pixels."""
    parts: dict[str, Cost] = field(default_factory=dict)
    """backbone, neck, queries."""
    components: dict[str, Cost] = field(default_factory=dict)
    """The decoder's, see :data:`COMPONENTS`."""

    @property
    def decoder(self) -> Cost:
        """All components of the decoder."""
        return sum(self.components.values(), Cost())

    @property
    def total(self) -> Cost:
        """The whole detector."""
        return sum(self.parts.values(), self.decoder)

    @property
    def reference_parameters(self) -> int:
        """The total as the reference counts it: with 4 constant position values per query, which we do not store."""
        return self.total.parameters + 4 * self.num_queries

    def as_dict(self) -> dict:
        """All numbers, for JSON."""
        return dict(
            input=self.size and "x".join(map(str, self.size)),
            num_queries=self.num_queries,
            reference_parameters=self.reference_parameters,
            total=self.total.as_dict(),
            **{name: cost.as_dict() for name, cost in self.parts.items()},
            decoder=self.decoder.as_dict(),
            components={name: cost.as_dict() for name, cost in self.components.items()},
        )


def build_on_meta(model_cfg: dict) -> QueryBased:
    """Build the detector of this model config without any weights, in evaluation mode.

    Raises:
        UserError: the config builds another kind of model.
    """
    model = build_without_weights(model_cfg)
    if not isinstance(model, QueryBased):
        raise UserError(f"model.type {model_cfg.get('type')!r} cannot be counted by this report; it counts QueryBased")
    return model.eval()


class OperationCounter(TorchDispatchMode):
    """Counts the operations that run inside it, under the name of the innermost module that ran them.

    Args:
        model: the module whose submodules' names are used; '' is the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products: dict[str, int] = defaultdict(int)
        self.elements: dict[str, int] = defaultdict(int)
        self._model, self._running = model, [""]

    @contextmanager
    def named(self) -> Iterator["OperationCounter"]:
        """Count, by module name."""
        hooks = []
        for name, module in self._model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: self._running.pop() and None))
        try:
            with self, self._deformable():
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _deformable(self) -> Iterator[None]:
        """Replace mmcv's deformable convolutions, which do not run on the meta device.

        An ordinary convolution of the same shape has their products; the sampling is added by hand: 4 elements for
        each sampled value, 1 more if a mask multiplies it.
        """

        def convolve(extra: int, x, weight, bias, stride, padding, dilation, groups) -> Tensor:
            out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            sampled = out[:, 0].numel() * x.shape[1] * weight.shape[2] * weight.shape[3]
            self.elements[self._running[-1]] += (4 + extra) * sampled
            return out

        def plain(x, offset, weight, stride=1, padding=0, dilation=1, groups=1, *_) -> Tensor:
            return convolve(0, x, weight, None, stride, padding, dilation, groups)

        def modulated(x, offset, mask, weight, bias, stride, padding, dilation, groups, *_) -> Tensor:
            return convolve(1, x, weight, bias, stride, padding, dilation, groups)

        with (
            patch.object(deform_conv, "deform_conv2d", plain),
            patch.object(modulated_deform_conv, "modulated_deform_conv2d", modulated),
        ):
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet, name = func._overloadpacket, self._running[-1]
        if packet in flop_registry:
            self.products[name] += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        elif not func.is_view and packet not in _FREE:
            self.elements[name] += self._elements(func, args, out)
        return out

    @staticmethod
    def _elements(func, args: tuple, out) -> int:
        packet = func._overloadpacket
        written = out[0] if isinstance(out, (tuple, list)) and out else out
        if not isinstance(written, Tensor) or not written.is_floating_point():
            return 0
        if packet in _NORMS:
            return 2 * written.numel()
        if packet is _aten.grid_sampler_2d:
            return 4 * written.numel()
        if packet in _READS:
            return args[0].numel()
        return written.numel() if packet in _WRITES or torch.Tag.pointwise in func.tags else 0


def component(name: str) -> str:
    """The decoder's component that a module or parameter belongs to, by its name without 'decoder.'."""
    return next(label for label, pattern in COMPONENTS.items() if re.match(pattern, name))


def count_operations(model: QueryBased, size: tuple[int, int]) -> OperationCounter:
    """Run a detector on the meta device for one image of (W, H) pixels, and count.

    LORS is applied query by query, as the paper does it; its other paths need no more operations than that.
    """
    divisor = getattr(model.data_preprocessor, "pad_size_divisor", 1)
    width, height = (math.ceil(side / divisor) * divisor for side in size)
    # Enabling gradients turns off PyTorch's fused inference path for attention, which hides its operations.
    decoder = model.decoder
    for half, path in ((decoder.lorsa, "weights"), (decoder.lorst, "features")):
        if half is not None:
            half.path = path
    with OperationCounter(model).named() as counter, torch.enable_grad():
        model._forward(torch.empty(1, 3, height, width, device="meta"))
    return counter


def measure(model_cfg: dict, size: tuple[int, int] | None = (1280, 800)) -> Report:
    """Count a detector's parameters, and its operations for one image.

    Args:
        model_cfg: the ``model`` of a config.
        size: (W, H) in pixels, padded as the data preprocessor pads; None counts parameters only.

    Raises:
        UserError: a model that is not a :class:`QueryBased`.
    """
    model = build_on_meta(model_cfg)
    costs: dict[str, Cost] = defaultdict(Cost)

    def cost_of(name: str) -> Cost:
        part, _, rest = name.partition(".")
        return costs["decoder." + component(rest) if part == "decoder" else PARTS.get(part, "other")]

    for name, parameter in model.named_parameters():
        cost = cost_of(name)
        cost.parameters += parameter.numel()
        cost.trainable += parameter.numel() * parameter.requires_grad

    if size is not None:
        counter = count_operations(model, size)
        for name, count in counter.products.items():
            cost_of(name).products += count
        for name, count in counter.elements.items():
            cost_of(name).elements += count
    return Report(
        num_queries=model.query_generator.num_queries,
        size=size,
        parts={label: cost for label, cost in costs.items() if not label.startswith("decoder.") and cost != Cost()},
        components={label: costs["decoder." + label] for label in COMPONENTS if "decoder." + label in costs},
    )


def encoder_parameters(model_cfg: dict) -> int:
    """Parameters of a vision transformer's layers, shared weights once; ``model_cfg`` is a config's ``model``."""
    return sum(p.numel() for p in build_without_weights(model_cfg).network.blocks.parameters())
