"""What goes into the layers of a model: second moments of their inputs over a few hundred images. PyTorch alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choice import OMIT, Layer, choose
from .low_rank import in_float64

BLOCK = 512
"""Columns of a second moment that are computed at once: only its lower triangle is."""


@dataclass(frozen=True)
class Moment:
    """Of one layer's inputs."""

    matrix: Tensor
    """C, the mean of x x^T, (in, in), float64; x is one token, or what a convolution's kernel sees at one place."""
    uses: float
    """How many x there are per call of the model."""


Moments = Mapping[str, Moment]


def second_moments(
    model: nn.Module, batches: Iterable[Any], omit: Sequence[str] = OMIT, convolutions: bool = False
) -> dict[str, Moment]:
    r"""Run a model and collect :math:`C = \frac{1}{n} \sum x x^T` of every layer that :func:`compress` would factorise.

    The model runs in evaluation mode without gradients, in one pass; every layer keeps one (in, in) matrix in float64.

    Args:
        model: any module; its mode is as before afterwards.
        batches: each is passed as ``model(batch)``, a tuple as ``model(*batch)`` and a dict as ``model(**batch)``.
        omit, convolutions: see :func:`compress`.

    Returns:
        By the layer's name.

    Raises:
        ValueError: no batches; an input that is not finite; a layer that was never called. Names the layer.
    """
    layers = {paths[0]: layer for layer, paths in choose(model, omit, convolutions).items()}
    sums = {name: _Sum() for name in layers}
    hooks = [
        layer.register_forward_pre_hook(partial(sums[name].add, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    modes = {module: module.training for module in model.modules()}
    calls = 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(*batch) if isinstance(batch, tuple) else model(batch)
                calls += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if not calls:
        raise ValueError("calibration has no batches")
    if unreached := [name for name in layers if not sums[name].rows]:
        raise ValueError(f"calibration never reaches {', '.join(unreached[:3])}: not called by the model; omit it")
    return {name: Moment(found.matrix(), found.rows / calls) for name, found in sums.items()}


def moments_of(by_weight: Mapping[Tensor, Sequence[str]], calibration: Moments | None) -> list[Moment | None]:
    """That of every weight, over all layers that have it; checked."""
    if calibration is None:
        return [None] * len(by_weight)
    found: list[Moment | None] = []
    for weight, paths in by_weight.items():
        if missing := [path for path in paths if path not in calibration]:
            raise ValueError(f"calibration has nothing of {missing[0]}")
        total = calibration[paths[0]]
        for path in paths[1:]:
            share = total.uses / (uses := total.uses + calibration[path].uses)
            total = Moment(total.matrix.lerp(calibration[path].matrix, 1 - share), uses)
        size = weight.flatten(1).shape[1]
        if total.matrix.shape != (size, size):
            raise ValueError(
                f"calibration: the moment of {paths[0]} is {tuple(total.matrix.shape)}, its layer has {size} inputs"
            )
        found.append(total)
    return found


class _Sum:
    """The lower triangle of the sum of x x^T so far."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def add(self, name: str, layer: Layer, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        x: Tensor = args[0] if args else kwargs["input"]
        parts: Iterable[Tensor] = [x.flatten(0, -2)]
        if isinstance(layer, nn.Conv2d):  # image by image: patches are as many times larger as a kernel has places
            parts = (_patches(layer, image) for image in x.reshape(-1, *x.shape[-3:]))
        for rows in parts:
            product = _lower_product(rows)
            if not product.isfinite().all():
                raise ValueError(f"calibration: what goes into {name} is not finite")
            self.total = in_float64(product) if self.total is None else self.total.add_(in_float64(product))
            self.rows += len(rows)

    def matrix(self) -> Tensor:
        """The mean of x x^T."""
        assert self.total is not None
        return (self.total + self.total.tril(-1).T) / self.rows


def _patches(layer: nn.Conv2d, image: Tensor) -> Tensor:
    """What the kernel sees at every place of an image (in, H, W): (places, in * kernel height * kernel width)."""
    padded = F.pad(image[None], layer._reversed_padding_repeated_twice)  # also of padding='same'
    return F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)[0].T


def _lower_product(rows: Tensor) -> Tensor:
    """x^T x of (n, in), zero above the diagonal but within blocks; the rest is its mirror image."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    size = rows.shape[1]
    product = rows.new_zeros(size, size)
    for i in range(0, size, BLOCK):
        torch.mm(rows[:, i:].T, rows[:, i : i + BLOCK], out=product[i:, i : i + BLOCK])
    return product.tril_()
