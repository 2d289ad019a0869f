"""PELA's compression: layers of a model become two factors each, and back. Needs PyTorch alone."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Moment, Moments, moments_of, second_moments
from .choice import OMIT, Layer, choose, names_by_weight, ranks_of
from .low_rank import LowRank, LowRankConv2d, LowRankLinear, in_float64


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one layer. A convolution's weight is a matrix (out, in * kernel height * kernel width)."""

    name: str
    in_features: int
    out_features: int
    rank: int
    bias: bool
    error: float | None
    """Relative, ||W - V U^T|| / ||W|| (Frobenius); None when the factors do not approximate a weight."""
    output_error: float | None = None
    """Relative, ||(W - V U^T) L|| / ||W L||: the root mean square of the outputs' error; None without calibration."""

    @property
    def multiply_adds_before(self) -> int:
        """Multiply-adds of the layer per token, or per place of the output."""
        return self.in_features * self.out_features

    @property
    def multiply_adds_after(self) -> int:
        """Multiply-adds of the two factors per token, or per place of the output."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def parameters_before(self) -> int:
        """Weight and bias of the layer."""
        return self.multiply_adds_before + self.bias * self.out_features

    @property
    def parameters_after(self) -> int:
        """Both factors and the bias."""
        return self.multiply_adds_after + self.bias * self.out_features


def compress(
    model: nn.Module,
    ratio: float | None = None,
    omit: Sequence[str] = OMIT,
    ranks: Mapping[str, int] | None = None,
    approximate: bool = True,
    inplace: bool = False,
    calibration: Iterable[Any] | Moments | None = None,
    convolutions: bool = False,
) -> tuple[nn.Module, list[CompressedLayer]]:
    r"""Make every Linear of a model a :class:`LowRankLinear` of rank floor(in * out / (ratio * (in + out))).

    The layers stay the objects that they are (of the copy, without ``inplace``), with their names, hooks, attributes,
    mode and gradient switch; Linears that share a weight share its factors. Left whole, with a warning: a Linear whose
    weight something else uses as well (an embedding), is computed (a parametrisation, pruning) or has hooks of its own,
    one that does not compute x W^T + b, and one without a size as yet.

    Args:
        model: any module.
        ratio: kappa of the paper's section 3.5; 2 halves every weight. ``None`` compresses what ``ranks`` names.
        omit: a layer whose name contains one of these stays whole.
        ranks: rank of the layers whose name contains the key, the longest key winning; a layer's whole name is that of
            this layer alone.
        approximate: ``False`` makes the structure alone, with new factors: for models of random weights, on the meta
            device, or whose weights are yet to be loaded.
        inplace: change ``model`` instead of a copy of it.
        calibration: approximate the layers' outputs instead of their weights, see
            :func:`~mmdet_lors.pela.low_rank.best_factors`: batches to run the model with, or what
            :func:`second_moments` made of them.
        convolutions: ungrouped ``nn.Conv2d`` too, as :class:`~mmdet_lors.pela.low_rank.LowRankConv2d`.

    Returns:
        The compressed model, and what became of each layer (of several that share a weight, of the first).

    Raises:
        ValueError: a ratio or rank that leaves a layer nothing, or makes it larger; a key of ``ranks`` that no layer
            has; a weight that is not finite, or is on the meta device with ``approximate``; nothing to compress;
            calibration that does not fit, see :func:`second_moments`. The model is unchanged then.
    """
    if ratio is None and not ranks:
        raise ValueError("neither ratio nor ranks is given: nothing to compress")
    if ratio is not None and not ratio > 0:
        raise ValueError(f"ratio must be above 0, got {ratio}")
    if isinstance(omit, str):
        raise ValueError(f"omit must be a list of parts of names, got {omit!r}")
    if calibration is not None and not approximate:
        raise ValueError("calibration needs weights to approximate: approximate must be True")
    if inplace and isinstance(model, Layer):
        raise ValueError("inplace needs a model that holds its layers; this model is itself one")
    # With ranks alone, what is not named stays whole on purpose; with calibration, second_moments says it.
    chosen = choose(model, omit, convolutions, warn=ratio is not None and calibration is None)
    chosen_ranks = ranks_of(chosen, ratio, ranks or {})
    by_weight = names_by_weight((chosen[layer][0], layer) for layer in chosen_ranks)
    for weight, (name, *_) in by_weight.items() if approximate else ():
        if weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device: approximate must be False")
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight holds values that are not finite")
    if calibration is not None and not isinstance(calibration, Mapping):
        calibration = second_moments(model, calibration, omit, convolutions)
    moments = moments_of(by_weight, calibration)

    found = {chosen[layer][0]: rank for layer, rank in chosen_ranks.items()}
    groups = list(by_weight.values())
    model = model if inplace else copied(model)
    report: list[CompressedLayer] = []
    for paths, moment in zip(groups, moments, strict=True):
        layers = [model.get_submodule(path) for path in paths]
        whole = _weight(layers[0])
        made = [_kind(layer).take(layer, found[path], False) for path, layer in zip(paths, layers, strict=True)]
        for other in made[1:]:
            other.U, other.V = made[0].U, made[0].V
        if approximate:
            made[0].fill(whole, moment.matrix if moment else None)
        report.append(_reported(paths[0], made[0], whole if approximate else None, moment))
    return model, report


def _kind(layer: nn.Module) -> type[LowRank]:
    return LowRankLinear if isinstance(layer, nn.Linear) else LowRankConv2d


def refill(compressed: nn.Module, plain: nn.Module, moments: Moments) -> None:
    """Fit every low-rank layer of a model to the outputs of the plain model's layer of its name."""
    names = [name for name, layer in compressed.named_modules() if isinstance(layer, LowRank)]
    by_weight = names_by_weight((name, plain.get_submodule(name)) for name in names)
    for (weight, names), moment in zip(by_weight.items(), moments_of(by_weight, moments), strict=True):
        layer = compressed.get_submodule(names[0])
        assert isinstance(layer, LowRank) and moment is not None
        layer.fill(weight, moment.matrix)


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def decompress(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The plain architecture: every low-rank layer becomes the one of weight V U^T, of the class it had.

    Args:
        model: what :func:`compress` returned, or holds it.
        inplace: change ``model`` instead of a copy of it.
    """
    model = model if inplace else copied(model)
    weights: dict[Tensor, Tensor] = {}
    for layer in [module for module in model.modules() if isinstance(module, LowRank)]:
        U = layer.U
        plain = layer.release()
        plain.weight = weights.setdefault(U, plain.weight)
    return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; also of weights that a hook computes before every call (pruning), which torch refuses to copy."""
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and t.grad_fn is not None]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


@torch.no_grad()
def _reported(name: str, layer: LowRank, weight: Tensor | None, moment: Moment | None) -> CompressedLayer:
    """A layer's size, and how far its product is from the weight it stands for."""
    sizes = len(layer.U), len(layer.V), layer.rank, layer.bias is not None
    if weight is None:
        return CompressedLayer(name, *sizes, error=None)
    W = in_float64(weight.flatten(1))
    rest = W - in_float64(layer.V) @ in_float64(layer.U).T
    error = _share(rest.square().sum(), W.square().sum())
    if moment is None:
        return CompressedLayer(name, *sizes, error)
    C = moment.matrix.to(W.device)
    return CompressedLayer(name, *sizes, error, _share(*(((m @ C) * m).sum() for m in (rest, W))))


def _share(rest: Tensor, whole: Tensor) -> float:
    """The root of what is left over of a whole; 0 of nothing."""
    return (rest.clamp(min=0) / whole).sqrt().item() if whole > 0 else 0.0
