"""What goes into the layers of a model: second moments of their inputs over a few hundred images. PyTorch alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    gradient: float | None = None
    """The mean of (dL / dy)^2 over the entries of the layer's outputs y; None without a loss L."""


Moments = Mapping[str, Moment]


def second_moments(
    model: nn.Module,
    batches: Iterable[Any],
    omit: Sequence[str] = OMIT,
    convolutions: bool = False,
    loss: Callable[[Any], Tensor] | None = None,
) -> dict[str, Moment]:
    r"""Run a model and collect :math:`C = \frac{1}{n} \sum x x^T` of every layer that :func:`compress` would factorise.

    The model runs in evaluation mode, in one pass; every layer keeps one (in, in) matrix in float64.

    Args:
        model: any module; its modes and gradients are as before afterwards.
        batches: each is passed as ``model(batch)``, a tuple as ``model(*batch)`` and a dict as ``model(**batch)``.
        omit, convolutions: see :func:`compress`.
        loss: a scalar of what the model returns, to measure how much each layer's outputs matter to it, for
            :func:`allocate`; every batch is then also run backward.

    Returns:
        By the layer's name.

    Raises:
        ValueError: no batches; an input that is not finite; a layer that was never called. Names the layer.
    """
    layers = {paths[0]: layer for layer, paths in choose(model, omit, convolutions).items()}
    sums = {name: _Sum(name) for name in layers}
    hooks = [layer.register_forward_pre_hook(sums[name].add, with_kwargs=True) for name, layer in layers.items()]
    weights = {layer.weight: (layer.weight.requires_grad, layer.weight.grad) for layer in layers.values()}
    modes = {module: module.training for module in model.modules()}
    calls = 0
    try:
        model.eval()
        if loss is not None:
            hooks += [layer.register_forward_hook(sums[name].watch) for name, layer in layers.items()]
            for weight in weights:  # a frozen layer's outputs would have no gradient
                weight.requires_grad_(True)
        with torch.set_grad_enabled(loss is not None):
            for batch in batches:
                if isinstance(batch, Mapping):
                    output = model(**batch)
                else:
                    output = model(*batch) if isinstance(batch, tuple) else model(batch)
                if loss is not None:
                    loss(output).backward(inputs=list(weights))
                calls += 1
    finally:
        for hook in hooks:
            hook.remove()
        for weight, (trained, grad) in weights.items():
            weight.requires_grad_(trained)
            weight.grad = grad
        for module, training in modes.items():
            module.training = training
    if not calls:
        raise ValueError("calibration has no batches")
    if unreached := [name for name in layers if not sums[name].rows]:
        raise ValueError(f"calibration never reaches {', '.join(unreached[:3])}: not called by the model; omit it")
    return {name: found.moment(calls, loss is not None) for name, found in sums.items()}


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
            more = calibration[path]
            share = more.uses / (total.uses + more.uses)
            gradient = None
            if total.gradient is not None and more.gradient is not None:
                gradient = total.gradient * (1 - share) + more.gradient * share
            total = Moment(total.matrix.lerp(more.matrix, share), total.uses + more.uses, gradient)
        size = weight.flatten(1).shape[1]
        if total.matrix.shape != (size, size):
            raise ValueError(
                f"calibration: the moment of {paths[0]} is {tuple(total.matrix.shape)}, its layer has {size} inputs"
            )
        found.append(total)
    return found


class _Sum:
    """Of one layer, what there was so far."""

    def __init__(self, name: str) -> None:
        self.name, self.rows, self.entries = name, 0, 0
        self.total: Tensor | None = None
        self.squares = 0.0

    @torch.no_grad()
    def add(self, layer: Layer, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook: the lower triangle of the sum of x x^T."""
        x: Tensor = args[0] if args else kwargs["input"]
        parts: Iterable[Tensor] = [x.flatten(0, -2)]
        if isinstance(layer, nn.Conv2d):  # image by image: patches are as many times larger as a kernel has places
            parts = (_patches(layer, image) for image in x.reshape(-1, *x.shape[-3:]))
        for rows in parts:
            product = _lower_product(rows)
            if not product.isfinite().all():
                raise ValueError(f"calibration: what goes into {self.name} is not finite")
            self.total = in_float64(product) if self.total is None else self.total.add_(in_float64(product))
            self.rows += len(rows)

    def watch(self, layer: Layer, args: tuple, output: Tensor) -> Tensor:
        """A forward hook: a copy, since an activation may be computed in place of the output, and of its base."""
        output = output.clone()
        assert output.grad_fn is not None
        output.grad_fn.register_prehook(self.add_gradient)
        return output

    def add_gradient(self, gradients: tuple[Tensor, ...]) -> None:
        """The sum of squares of the outputs' gradient."""
        if gradients[0] is not None:
            self.squares += gradients[0].detach().float().square().sum().item()
            self.entries += gradients[0].numel()

    def moment(self, calls: int, watched: bool) -> Moment:
        """The means."""
        assert self.total is not None
        matrix = (self.total + self.total.tril(-1).T) / self.rows
        return Moment(matrix, self.rows / calls, self.squares / max(self.entries, 1) if watched else None)


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
