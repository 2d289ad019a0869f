"""PELA's low-rank approximation: every Linear of a model becomes two factors. Needs PyTorch alone."""

import copy
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OMIT = ("norm", "head", "patch_embed", "downsample")
"""Parts of names that the paper's code leaves whole in every model; a model need not have all of them."""

OVERSAMPLING, POWER_ITERATIONS = 16, 4
"""Of the randomised SVD: extra directions that it draws, and turns that it takes to find the leading ones."""


def start_std(in_features: int, rank: int) -> float:
    """Standard deviation of both factors at which V U^T has the variance of a new nn.Linear's weight, 1 / (3 in)."""
    return (3 * in_features * rank) ** -0.25


@torch.no_grad()
def best_factors(weight: Tensor, rank: int, randomized: bool = False) -> tuple[Tensor, Tensor]:
    r"""The best approximation of a weight that has this rank, :math:`W \approx V U^T`, half of each singular value
    on either side: :math:`U^T U = V^T V = \Sigma_r`.

    With Q the leading left singular vectors, the best approximation is :math:`Q Q^T W` (Eckart-Young). Q comes from the
    eigenvectors of W W^T (W^T W for a tall W), in float64: cheaper than an SVD, and the small singular values, which
    squaring blurs, do not enter the product. A direction in which W has nothing
    keeps V zero and U as a new layer starts, so that it can learn.

    Args:
        weight: (out, in).
        rank: r, at most min(in, out).
        randomized: let :func:`torch.svd_lowrank` find Q, which is near the best but not the best. Its random numbers
            are always the same ones, and the caller's generator is left as it was.

    Returns:
        U (in, r) and V (out, r), of the weight's dtype and device. Source: PELA paper, equations 2 and 3.
    """
    tall = weight.shape[0] > weight.shape[1]
    W = _in_float64(weight.T if tall else weight)
    if randomized:
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(0)
            Q = torch.svd_lowrank(W.float(), min(rank + OVERSAMPLING, len(W)), POWER_ITERATIONS)[0]
        Q = Q[:, :rank].double()
    else:
        Q = torch.linalg.eigh(W @ W.T)[1][:, -rank:].flip(1)
    projected = W.T @ Q
    values = projected.norm(dim=0)
    dead = values <= torch.finfo(values.dtype).eps * max(W.shape) * values.max()
    half = torch.where(dead, 1, values).sqrt()
    U, V = (Q * half, projected / half) if tall else (projected / half, Q * half)
    if dead.any():
        start = torch.randn(U.shape, generator=torch.Generator().manual_seed(0), dtype=U.dtype)
        U = torch.where(dead, start.to(U.device) * start_std(*U.shape), U)
        V = torch.where(dead, 0, V)
    return U.to(weight), V.to(weight)


def _in_float64(tensor: Tensor) -> Tensor:
    """On the CPU where the tensor's device has no float64, as mps and some of Intel's GPUs."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()


class LowRankLinear(nn.Module):
    r"""A Linear whose weight is a product of two narrow ones, :math:`y = V (U^T x) + b`.

    :math:`U \in R^{in \times r}`, :math:`V \in R^{out \times r}`, b (out,). Source: PELA paper, equation 1. U, V and
    ``bias`` are its keys in a state dict; it also loads ``weight`` of the Linear that it replaces, by factorising it.

    Code that reads the weight of a Linear instead of calling it (``nn.MultiheadAttention`` does with ``out_proj``)
    finds :attr:`weight`: right, and trained through, but multiplied out at every read.

    Args:
        in_features, out_features: size of the map.
        rank: r.
        bias: whether it has b.
        randomized: how a whole weight is factorised when it is loaded, see :func:`best_factors`.
        device, dtype: of its parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        randomized: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.randomized = randomized
        self.U = nn.Parameter(torch.empty(in_features, rank, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal factors of one size, whose product has the variance of a new nn.Linear's weight; its bias, too."""
        for factor in (self.U, self.V):
            nn.init.normal_(factor, std=start_std(self.in_features, self.rank))
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, approximate: bool = True, randomized: bool = False
    ) -> "LowRankLinear":
        """The low-rank layer of a Linear; the bias is the Linear's own parameter.

        Args:
            linear: left as it is.
            rank: r.
            approximate: ``False`` starts U and V anew, without reading the weight.
            randomized: see :func:`best_factors`.
        """
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, rank, False, randomized, device=weight.device, dtype=weight.dtype
        )
        layer.bias = linear.bias
        if approximate:
            layer.fill(weight)
        for factor in (layer.U, layer.V):
            factor.requires_grad_(weight.requires_grad)
        return layer.train(linear.training)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Make V U^T the best approximation of a weight (out, in)."""
        U, V = best_factors(weight.to(self.U.device), self.rank, self.randomized)
        self.U.copy_(U)
        self.V.copy_(V)

    @property
    def weight(self) -> Tensor:
        """V U^T, (out, in)."""
        return self.V @ self.U.T

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without forming V U^T."""
        return F.linear(F.linear(x, self.U.T), self.V, self.bias)

    def to_linear(self) -> nn.Linear:
        """The plain Linear it is equal to; the bias is its own parameter."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=False, device=self.U.device, dtype=self.U.dtype
        ).train(self.training)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
        linear.weight.requires_grad_(self.U.requires_grad)
        linear.bias = self.bias
        return linear

    def loads_instead(self) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
        """Keys of its own, and name -> shape of what a state dict may hold in their place."""
        return ("U", "V"), {"weight": (self.out_features, self.in_features)}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and prefix + "U" not in state_dict:
            del state_dict[prefix + "weight"]
            if weight.shape == (self.out_features, self.in_features) and torch.isfinite(weight).all():
                U, V = best_factors(weight.to(self.U.device), self.rank, self.randomized)
                state_dict.update({prefix + "U": U, prefix + "V": V})
            elif weight.shape == (self.out_features, self.in_features):
                errors.append(f"{prefix}weight holds values that are not finite")
            else:
                errors.append(
                    f"size mismatch for {prefix}weight: {tuple(weight.shape)} in the checkpoint, "
                    f"({self.out_features}, {self.in_features}) in the model before it was compressed"
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


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
        """Of the Linear, per token."""
        return self.in_features * self.out_features

    @property
    def multiply_adds_after(self) -> int:
        """Of the two factors, per token."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def parameters_before(self) -> int:
        """Weight and bias of the Linear."""
        return self.multiply_adds_before + self.bias * self.out_features

    @property
    def parameters_after(self) -> int:
        """Both factors and the bias."""
        return self.multiply_adds_after + self.bias * self.out_features


def paper_rank(in_features: int, out_features: int, ratio: float) -> int:
    """floor(in * out / (ratio * (in + out))): the rank at which a weight keeps 1 / ratio of its parameters (3.5)."""
    return math.floor(in_features * out_features / (ratio * (in_features + out_features)))


def is_plain(linear: nn.Linear) -> bool:
    """Whether calling this layer is x W^T + b: a subclass may do more, which is found by asking it."""
    if type(linear).forward is nn.Linear.forward:
        return True
    probe = copy.deepcopy(linear)
    weight, bias = probe.weight, probe.bias
    with torch.no_grad():
        # Its own weights may not be there yet.
        for p in (weight, bias):
            if p is not None:
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        x = torch.linspace(-1, 1, 2 * linear.in_features).view(2, -1).to(weight)
        try:
            found, expected = probe(x), F.linear(x, weight, bias)
        except Exception:  # whatever it needs is more than a Linear's input
            return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return found.is_meta or torch.allclose(found, expected, atol=1e-6)


def compress(
    model: nn.Module,
    ratio: float,
    omit: Sequence[str] = OMIT,
    ranks: Mapping[str, int] | None = None,
    approximate: bool = True,
    inplace: bool = False,
    randomized: bool = False,
) -> tuple[nn.Module, list[CompressedLayer]]:
    r"""Replace every Linear of a model by a :class:`LowRankLinear` of rank floor(in * out / (ratio * (in + out))).

    Layers in two places stay one layer, Linears that share a weight share its factors. Left whole, with a warning: a
    Linear whose weight something else uses as well (an embedding), or is computed (a parametrisation), and a subclass
    that does not compute x W^T + b.

    Args:
        model: any module.
        ratio: kappa of the paper's section 3.5; 2 halves every weight.
        omit: a Linear whose name contains one of these stays whole.
        ranks: rank of the Linears whose name contains the key; the longest key wins.
        approximate: ``False`` makes the structure alone, with new factors: for models of random weights, on the meta
            device, or whose weights are yet to be loaded.
        inplace: change ``model`` instead of a copy of it.
        randomized: see :func:`best_factors`.

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
    names = _names_of_linears(model)
    _warn_of_unused(model, omit, names)
    chosen = _without_ties(model, _chosen(names, omit))
    if not chosen:
        raise ValueError(f"omit leaves no Linear to compress; the model has {_summary(names)}")
    chosen_ranks = _ranks(chosen, ratio, ranks or {})
    for linear, (name, *_) in chosen.items() if approximate else ():
        if linear.weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device: approximate must be False")
        if not torch.isfinite(linear.weight).all():
            raise ValueError(f"{name}.weight holds values that are not finite")

    chosen_ranks = {paths[0]: chosen_ranks[linear] for linear, paths in chosen.items()}
    if not inplace:
        model = copy.deepcopy(model)
    chosen = {(model.get_submodule(paths[0]) if paths[0] else model): paths for paths in chosen.values()}
    report, factors = [], {}
    for linear, paths in chosen.items():
        known = factors.get(id(linear.weight))
        layer = LowRankLinear.from_linear(linear, chosen_ranks[paths[0]], approximate and known is None, randomized)
        if known is None:
            error = _relative_error(linear.weight, layer) if approximate else None
            report.append(
                CompressedLayer(
                    paths[0], linear.in_features, linear.out_features, layer.rank, linear.bias is not None, error
                )
            )
            # The weight is kept too, for its id to stay its own.
            factors[id(linear.weight)] = layer.U, layer.V, linear.weight
        else:
            layer.U, layer.V, _ = known
        model = _put(model, paths, layer)
    return model, report


def decompress(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The plain architecture: every :class:`LowRankLinear` becomes the nn.Linear of weight V U^T.

    Args:
        model: what :func:`compress` returned, or holds it.
        inplace: change ``model`` instead of a copy of it.
    """
    if not inplace:
        model = copy.deepcopy(model)
    places: dict[LowRankLinear, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowRankLinear):
            places[module].append(name)
    weights: dict[int, nn.Parameter] = {}
    for layer, paths in places.items():
        linear = layer.to_linear()
        linear.weight = weights.setdefault(id(layer.U), linear.weight)
        model = _put(model, paths, linear)
    return model


def _names_of_linears(model: nn.Module) -> dict[nn.Linear, list[str]]:
    """Every Linear, with each of the names under which the model holds it."""
    names: dict[nn.Linear, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names[module].append(name)
    return names


def _chosen(names: Mapping[nn.Linear, list[str]], omit: Sequence[str]) -> dict[nn.Linear, list[str]]:
    """Those that are not omitted and that factors can stand in for."""
    chosen = {}
    for linear, paths in names.items():
        if any(part in path for part in omit for path in paths):
            continue
        if "weight" not in linear._parameters:
            _warn(f"{paths[0]} is left whole: its weight is computed, by {type(linear).__name__}")
        elif not is_plain(linear):
            _warn(f"{paths[0]} is left whole: {type(linear).__name__} does more than x W^T + b")
        else:
            chosen[linear] = paths
    return chosen


def _without_ties(model: nn.Module, chosen: dict[nn.Linear, list[str]]) -> dict[nn.Linear, list[str]]:
    """Those whose weight nothing but chosen Linears uses."""
    strangers = {
        id(p): f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None and not (module in chosen and key == "weight")
    }
    for linear, paths in chosen.items():
        if id(linear.weight) in strangers:
            _warn(f"{paths[0]} is left whole: it shares its weight with {strangers[id(linear.weight)]}")
    return {linear: paths for linear, paths in chosen.items() if id(linear.weight) not in strangers}


def _ranks(chosen: Mapping[nn.Linear, list[str]], ratio: float, ranks: Mapping[str, int]) -> dict[nn.Linear, int]:
    """Every layer's rank, checked."""
    for key in ranks:
        if not any(key in path for paths in chosen.values() for path in paths):
            raise ValueError(f"ranks has {key!r}, which no compressed layer's name contains; they are {_names(chosen)}")
    found, by_weight = {}, {}
    for linear, paths in chosen.items():
        rows, cols = linear.weight.shape
        key = max((key for key in ranks if any(key in path for path in paths)), key=len, default=None)
        rank = paper_rank(cols, rows, ratio) if key is None else ranks[key]
        field = f"ratio {ratio}" if key is None else f"ranks[{key!r}]"
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ValueError(f"{field} must be an integer, got {rank!r}")
        if rank < 1:
            raise ValueError(f"{field} leaves {paths[0]} ({rows} x {cols}) rank {rank}: lower the ratio or omit it")
        if rank * (rows + cols) > rows * cols:
            raise ValueError(
                f"{field} makes {paths[0]} ({rows} x {cols}) larger: rank {rank} has {rank * (rows + cols)} parameters "
                f"instead of {rows * cols}; at most {paper_rank(cols, rows, 1)} is smaller"
            )
        if by_weight.setdefault(id(linear.weight), rank) != rank:
            raise ValueError(f"{field} gives {paths[0]} another rank than the layer that it shares its weight with")
        found[linear] = rank
    return found


def _put(model: nn.Module, paths: Sequence[str], module: nn.Module) -> nn.Module:
    """Set a module at each of these places; '' is the model itself. Returns the model."""
    for path in paths:
        if not path:
            return module
        parent, _, child = path.rpartition(".")
        model.get_submodule(parent).register_module(child, module)
    return model


@torch.no_grad()
def _relative_error(weight: Tensor, layer: LowRankLinear) -> float:
    W = _in_float64(weight)
    norm = W.norm()
    return ((W - _in_float64(layer.V) @ _in_float64(layer.U).T).norm() / norm).item() if norm else 0.0


def _names(linears: Mapping[nn.Linear, list[str]]) -> str:
    """Names of layers, those that differ by a number alone as one."""
    patterns = dict.fromkeys(re.sub(r"\d+", "*", paths[0]) for paths in linears.values())
    return ", ".join(patterns)


def _summary(names: Mapping[nn.Linear, list[str]]) -> str:
    return f"the Linears {_names(names)}" if names else "no Linear"


def _warn_of_unused(model: nn.Module, omit: Sequence[str], names: Mapping[nn.Linear, list[str]]) -> None:
    modules = [name for name, _ in model.named_modules()]
    for part in omit:
        if part not in OMIT and not any(part in name for name in modules):
            _warn(f"omit has {part!r}, which no name of the model contains; it has {_summary(names)}")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
