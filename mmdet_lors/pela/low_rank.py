"""PELA's low-rank layers, and the factors that approximate a weight best. Needs PyTorch alone."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_lors.lors.computed import ComputesWeights, computed_weight

Layer = TypeVar("Layer", bound=nn.Module)


def start_std(in_features: int, rank: int) -> float:
    """Standard deviation of both factors at which V U^T has the variance of a new nn.Linear's weight, 1 / (3 in)."""
    return (3 * in_features * rank) ** -0.25


def matrix_root(moment: Tensor) -> Tensor:
    r"""L of :math:`L L^T = C + \epsilon I`, by Cholesky, with the smallest of 1e-6, 1e-5, ... of C's mean diagonal.

    Directions in which no input has anything keep a little weight, so that they come last, but are not lost.
    """
    C = in_float64(moment)
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    ridge = 1e-6 * C.diagonal().mean() if C.any() else 1.0
    while True:
        L, failed = torch.linalg.cholesky_ex(C + ridge * identity)
        if not failed:
            return L
        ridge *= 10


@torch.no_grad()
def squared_singular_values(weight: Tensor, moment: Tensor | None = None) -> Tensor:
    """Of W, or of W L with L L^T = C: what each direction adds to the outputs. Descending, min(in, out), float64."""
    return _spectrum(in_float64(weight), moment)[0].clamp(min=0).flip(0)


def _spectrum(W: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Eigenvalues (ascending) and eigenvectors of M^T M for a tall M = W L, of M M^T for a wide one; M, and L."""
    L = None if moment is None else matrix_root(moment.to(W.device))
    M = W if L is None else W @ L
    values, Q = torch.linalg.eigh(M.T @ M if len(W) > W.shape[1] else M @ M.T)
    return values, Q, M, L


@torch.no_grad()
def best_factors(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The best approximation of a weight that has this rank, :math:`W \approx V U^T`.

    .. math:: \min_{U, V}\ \mathrm{E}\, \|(W - V U^T)\, x\|^2 = \|(W - V U^T)\, L\|_F^2,
        \qquad C = \mathrm{E}\, x x^T = L L^T

    Without C, or with C = I, that is the truncated SVD. With Q the leading left singular vectors of M = W L, it is
    :math:`Q Q^T W` (Eckart-Young), and with its leading right ones, P, :math:`M P P^T L^{-1}`, the same. Q or P,
    whichever is smaller, come from the eigenvectors of M M^T or M^T M, in float64: cheaper than an SVD, and the small
    singular values, which squaring blurs, do not enter the product. Columns of U and V are of one length, half of
    each singular value on either side. A direction in which W has nothing keeps V zero and U as a new layer starts,
    so that it can learn.

    Args:
        weight: (out, in).
        rank: r, at most min(in, out).
        moment: C, (in, in). A little is added to its diagonal, see :func:`matrix_root`; on the data that it is from,
            the error stays at most the truncated SVD's.

    Returns:
        U (in, r) and V (out, r), of the weight's dtype and device. Sources: PELA paper, equations 2 and 3; with C,
        SVD-LLM (arXiv:2403.07378).
    """
    W = in_float64(weight)
    _, Q, M, L = _spectrum(W, moment)
    Q = Q[:, -rank:].flip(1)
    if len(W) > W.shape[1]:
        U, V = (Q if L is None else torch.linalg.solve_triangular(L.T, Q, upper=True)), M @ Q
        values = V.norm(dim=0)
    else:
        U, V = W.T @ Q, Q
        values = (M.T @ Q).norm(dim=0)
    dead = values <= torch.finfo(values.dtype).eps * max(W.shape) * values.max()
    scale = torch.where(dead, 1, V.norm(dim=0) / U.norm(dim=0)).sqrt()
    U, V = U * scale, V / scale
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


class LowRank(ComputesWeights):
    r"""A layer whose weight, as a matrix (out, in), is a product of two narrow ones, :math:`V U^T`.

    :math:`U \in R^{in \times r}`, :math:`V \in R^{out \times r}`, b (out,). U, V and ``bias`` are its keys in a state
    dict; it also loads ``weight`` of the layer that it replaces, by factorising it.

    Code that reads the weight instead of calling the layer (``nn.MultiheadAttention`` does with ``out_proj``) finds
    :attr:`weight`: right, and trained through, but multiplied out at every read. Writing into it is an error.
    """

    U: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    rank: int
    _plain_class: type[nn.Module]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight that the layer stands for."""
        raise NotImplementedError

    def _new(self, rank: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Factors without values, in front of the other parameters."""
        rows, *cols = self.weight_shape
        sizes = dict(U=torch.Size(cols).numel(), V=rows)
        factors = {n: nn.Parameter(torch.empty(size, rank, device=device, dtype=dtype)) for n, size in sizes.items()}
        self._parameters = {**factors, **self._parameters}
        self.rank = rank

    def reset_parameters(self) -> None:
        """Normal factors of one size, whose product has the variance of a new layer's weight; its bias, too."""
        self._reset_factors()
        if self.bias is not None:
            bound = len(self.U) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def _reset_factors(self) -> None:
        for factor in (self.U, self.V):
            nn.init.normal_(factor, std=start_std(*self.U.shape))

    @classmethod
    def take(cls: type["LowRankLayer"], layer: nn.Module, rank: int, approximate: bool = True) -> "LowRankLayer":
        """Make a layer low-rank: the same object, so that it keeps what is attached to it or refers to it.

        Args:
            layer: it has an ordinary weight; its bias stays the same parameter.
            rank: r.
            approximate: ``False`` initialises U and V, without reading the weight.
        """
        weight, kind = layer._parameters["weight"], type(layer)
        assert weight is not None
        taken: Any = layer
        taken.__class__ = cls
        taken._parameters = {name: p for name, p in layer._parameters.items() if name != "weight"}
        taken._new(rank, weight.device, weight.dtype)
        taken._plain_class = kind
        if approximate:
            taken.fill(weight)
        else:
            taken._reset_factors()
        for factor in (taken.U, taken.V):
            factor.requires_grad_(weight.requires_grad)
            factor.__dict__.update(weight.__dict__)
        return taken

    @torch.no_grad()
    def fill(self, weight: Tensor, moment: Tensor | None = None) -> None:
        """Make V U^T the best approximation of a weight, see :func:`best_factors`."""
        U, V = best_factors(weight.flatten(1).to(self.U.device), self.rank, moment)
        self.U.copy_(U)
        self.V.copy_(V)

    weight = computed_weight("product", "weight is computed, V U^T: write to U and V, or call fill(weight)")

    def product(self) -> Tensor:
        """V U^T, in the weight's shape."""
        return (self.V @ self.U.T).view(self.weight_shape)

    def release(self) -> nn.Linear | nn.Conv2d:
        """Become the plain layer that it is equal to: the same object again, of the class that it had."""
        weight = nn.Parameter(self.product().detach(), requires_grad=self.U.requires_grad)
        weight.__dict__.update(self.U.__dict__)
        others = {name: p for name, p in self._parameters.items() if name not in ("U", "V")}
        released: Any = self
        released.__class__ = self._plain_class
        del released.rank, released._plain_class
        released._parameters = dict(weight=weight, **others)
        return released

    def loads_instead(self) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
        """Keys of its own, and name -> shape of what a state dict may hold in their place."""
        return ("U", "V"), {"weight": self.weight_shape}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and prefix + "U" not in state_dict:
            del state_dict[prefix + "weight"]
            if weight.shape == self.weight_shape and torch.isfinite(weight).all():
                U, V = best_factors(weight.flatten(1).to(self.U.device), self.rank)
                state_dict.update({prefix + "U": U, prefix + "V": V})
            elif weight.shape == self.weight_shape:
                errors.append(f"{prefix}weight holds values that are not finite")
            else:
                errors.append(
                    f"size mismatch for {prefix}weight: {tuple(weight.shape)} in the checkpoint, "
                    f"{self.weight_shape} in the model before it was compressed"
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


LowRankLayer = TypeVar("LowRankLayer", bound=LowRank)


class LowRankLinear(LowRank):
    r"""A Linear of low rank, :math:`y = V (U^T x) + b`. Source: PELA paper, equation 1. See :class:`LowRank`.

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
        self.in_features, self.out_features, self._plain_class = in_features, out_features, nn.Linear
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._new(rank, device, dtype)
        self.reset_parameters()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without forming V U^T."""
        return F.linear(F.linear(x, self.U.T), self.V, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankConv2d(LowRank):
    r"""A convolution of low rank: one of the same kernel, stride and padding to r channels, then one of 1 x 1.

    .. math:: y = V * (U^T * x) + b, \qquad U \in R^{in\, k_h k_w \times r},\ V \in R^{out \times r}

    Made of an ungrouped, zero-padded ``nn.Conv2d`` by :meth:`take`, whose settings it keeps. Source: Zhang et al.,
    arXiv:1505.06798, section 3.1, there calibrated with the responses; a 1 x 1 convolution is a Linear at every place.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W'), without forming V U^T."""
        kernel = self.U.T.reshape(self.rank, *self.weight_shape[1:])
        narrow = F.conv2d(x, kernel, None, self.stride, self.padding, self.dilation)
        return F.conv2d(narrow, self.V[:, :, None, None], self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}, rank={self.rank}"
