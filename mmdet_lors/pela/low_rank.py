"""PELA's low-rank layer, and the factors that approximate a weight best. Needs PyTorch alone."""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_lors.lors.computed import ComputesWeights, computed_weight

Layer = TypeVar("Layer", bound=nn.Module)


def start_std(in_features: int, rank: int) -> float:
    """Standard deviation of both factors at which V U^T has the variance of a new nn.Linear's weight, 1 / (3 in)."""
    return (3 * in_features * rank) ** -0.25


@torch.no_grad()
def best_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""The best approximation of a weight that has this rank, :math:`W \approx V U^T`, half of each singular value
    on either side: :math:`U^T U = V^T V = \Sigma_r`.

    With Q the leading left singular vectors, the best approximation is :math:`Q Q^T W` (Eckart-Young). Q comes from the
    eigenvectors of W W^T (W^T W for a tall W), in float64: cheaper than an SVD, and the small singular values, which
    squaring blurs, do not enter the product. A direction in which W has nothing
    keeps V zero and U as a new layer starts, so that it can learn.

    Args:
        weight: (out, in).
        rank: r, at most min(in, out).

    Returns:
        U (in, r) and V (out, r), of the weight's dtype and device. Source: PELA paper, equations 2 and 3.
    """
    tall = weight.shape[0] > weight.shape[1]
    W = in_float64(weight.T if tall else weight)
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


def in_float64(tensor: Tensor) -> Tensor:
    """On the CPU where the tensor's device has no float64, as mps and some of Intel's GPUs."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()


class LowRankLinear(ComputesWeights):
    r"""A Linear whose weight is a product of two narrow ones, :math:`y = V (U^T x) + b`.

    :math:`U \in R^{in \times r}`, :math:`V \in R^{out \times r}`, b (out,). Source: PELA paper, equation 1. U, V and
    ``bias`` are its keys in a state dict; it also loads ``weight`` of the Linear that it replaces, by factorising it.

    Code that reads the weight of a Linear instead of calling it (``nn.MultiheadAttention`` does with ``out_proj``)
    finds :attr:`weight`: right, and trained through, but multiplied out at every read. Writing into it is an error.

    Args:
        in_features, out_features: size of the map.
        rank: r.
        bias: whether it has b.
        device, dtype: of its parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self._plain_class = nn.Linear
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
    def take(cls, linear: nn.Linear, rank: int, approximate: bool = True) -> "LowRankLinear":
        """Make a Linear low-rank: the same object, so that it keeps what is attached to it or refers to it.

        Args:
            linear: it has an ordinary weight; its bias stays the same parameter.
            rank: r.
            approximate: ``False`` initialises U and V, without reading the weight.
        """
        weight, kind = linear.weight, type(linear)
        new = cls(weight.shape[1], weight.shape[0], rank, False, device=weight.device, dtype=weight.dtype)
        if approximate:
            new.fill(weight)
        for factor in (new.U, new.V):
            factor.requires_grad_(weight.requires_grad)
            factor.__dict__.update(weight.__dict__)
        others = {name: p for name, p in linear._parameters.items() if name != "weight"}
        taken: Any = linear
        taken.__class__ = cls
        taken._parameters = dict(U=new.U, V=new.V, **others)
        taken.rank, taken._plain_class = rank, kind
        return taken

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, approximate: bool = True) -> "LowRankLinear":
        """:meth:`take` of another object, which has the Linear's bias and hooks; the Linear is left as it is."""
        return cls.take(_twin(linear), rank, approximate)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Make V U^T the best approximation of a weight (out, in)."""
        U, V = best_factors(weight.to(self.U.device), self.rank)
        self.U.copy_(U)
        self.V.copy_(V)

    weight = computed_weight("product", "weight is computed, V U^T: write to U and V, or call fill(weight)")

    def product(self) -> Tensor:
        """V U^T, (out, in)."""
        return self.V @ self.U.T

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without forming V U^T."""
        return F.linear(F.linear(x, self.U.T), self.V, self.bias)

    def release(self) -> nn.Linear:
        """Become the plain Linear that it is equal to: the same object again, of the class that it had."""
        weight = nn.Parameter(self.product().detach(), requires_grad=self.U.requires_grad)
        weight.__dict__.update(self.U.__dict__)
        others = {name: p for name, p in self._parameters.items() if name not in ("U", "V")}
        released: Any = self
        released.__class__ = self._plain_class
        del released.rank, released._plain_class
        released._parameters = dict(weight=weight, **others)
        return released

    def to_linear(self) -> nn.Linear:
        """:meth:`release` of another object, which has this one's bias and hooks."""
        return _twin(self).release()

    def loads_instead(self) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
        """Keys of its own, and name -> shape of what a state dict may hold in their place."""
        return ("U", "V"), {"weight": (self.out_features, self.in_features)}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and prefix + "U" not in state_dict:
            del state_dict[prefix + "weight"]
            if weight.shape == (self.out_features, self.in_features) and torch.isfinite(weight).all():
                U, V = best_factors(weight.to(self.U.device), self.rank)
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


def _twin(module: Layer) -> Layer:
    """Another object with the same parameters, buffers, hooks and attributes."""
    twin = copy.copy(module)
    for held in ("_parameters", "_buffers", "_modules"):
        setattr(twin, held, dict(getattr(module, held)))
    return twin
