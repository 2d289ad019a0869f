"""PELA's compression: every Linear of a model becomes two factors, and back. Needs PyTorch alone."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .choice import OMIT, choose, ranks_of
from .low_rank import LowRankLinear, in_float64


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one Linear."""

    name: str
    in_features: int
    out_features: int
    rank: int
    bias: bool
    error: float | None
    """Relative, ||W - V U^T|| / ||W|| (Frobenius); None when the factors do not approximate a weight."""

    @property
    def multiply_adds_before(self) -> int:
        """Multiply-adds of the Linear per token."""
        return self.in_features * self.out_features

    @property
    def multiply_adds_after(self) -> int:
        """Multiply-adds of the two factors per token."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def parameters_before(self) -> int:
        """Weight and bias of the Linear."""
        return self.multiply_adds_before + self.bias * self.out_features

    @property
    def parameters_after(self) -> int:
        """Both factors and the bias."""
        return self.multiply_adds_after + self.bias * self.out_features


def compress(
    model: nn.Module,
    ratio: float,
    omit: Sequence[str] = OMIT,
    ranks: Mapping[str, int] | None = None,
    approximate: bool = True,
    inplace: bool = False,
) -> tuple[nn.Module, list[CompressedLayer]]:
    r"""Make every Linear of a model a :class:`LowRankLinear` of rank floor(in * out / (ratio * (in + out))).

    The layers stay the objects that they are (of the copy, without ``inplace``), with their names, hooks, attributes,
    mode and gradient switch; Linears that share a weight share its factors. Left whole, with a warning: a Linear whose
    weight something else uses as well (an embedding), is computed (a parametrisation, pruning) or has hooks of its own,
    one that does not compute x W^T + b, and one without a size as yet.

    Args:
        model: any module.
        ratio: kappa of the paper's section 3.5; 2 halves every weight.
        omit: a Linear whose name contains one of these stays whole.
        ranks: rank of the Linears whose name contains the key; the longest key wins.
        approximate: ``False`` makes the structure alone, with new factors: for models of random weights, on the meta
            device, or whose weights are yet to be loaded.
        inplace: change ``model`` instead of a copy of it.

    Returns:
        The compressed model, and what became of each layer (of several that share a weight, of the first).

    Raises:
        ValueError: a ratio or rank that leaves a layer nothing, or makes it larger; a key of ``ranks`` that no Linear
            has; a weight that is not finite, or is on the meta device with ``approximate``; nothing to compress. The
            model is unchanged then.
    """
    if not ratio > 0:
        raise ValueError(f"ratio must be above 0, got {ratio}")
    if isinstance(omit, str):
        raise ValueError(f"omit must be a list of parts of names, got {omit!r}")
    if inplace and isinstance(model, nn.Linear):
        raise ValueError("inplace needs a model that holds its Linear layers; this model is itself one")
    chosen = choose(model, omit)
    chosen_ranks = ranks_of(chosen, ratio, ranks or {})
    for linear, (name, *_) in chosen.items() if approximate else ():
        if linear.weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device: approximate must be False")
        if not torch.isfinite(linear.weight).all():
            raise ValueError(f"{name}.weight holds values that are not finite")

    found = [(paths[0], chosen_ranks[linear]) for linear, paths in chosen.items()]
    model = model if inplace else copied(model)
    report: list[CompressedLayer] = []
    factors: dict[Tensor, tuple[nn.Parameter, nn.Parameter]] = {}
    for path, rank in found:
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        weight = module.weight
        known = factors.get(weight)
        layer = LowRankLinear.take(module, rank, approximate and known is None)
        if known is not None:
            layer.U, layer.V = known
            continue
        factors[weight] = layer.U, layer.V
        error = _relative_error(weight, layer) if approximate else None
        report.append(CompressedLayer(path, layer.in_features, layer.out_features, rank, layer.bias is not None, error))
    return model, report


def decompress(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The plain architecture: every :class:`LowRankLinear` becomes the Linear of weight V U^T, of the class it had.

    Args:
        model: what :func:`compress` returned, or holds it.
        inplace: change ``model`` instead of a copy of it.
    """
    model = model if inplace else copied(model)
    weights: dict[Tensor, Tensor] = {}
    for layer in [module for module in model.modules() if isinstance(module, LowRankLinear)]:
        U = layer.U
        linear = layer.release()
        linear.weight = weights.setdefault(U, linear.weight)
    return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; also of weights that a hook computes before every call (pruning), which torch refuses to copy."""
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and t.grad_fn is not None]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


@torch.no_grad()
def _relative_error(weight: Tensor, layer: LowRankLinear) -> float:
    W = in_float64(weight)
    norm = W.norm()
    return ((W - in_float64(layer.V) @ in_float64(layer.U).T).norm() / norm).item() if norm else 0.0
