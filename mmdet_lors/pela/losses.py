"""PELA's two losses, feature distillation and weight perturbation, as the paper writes them or as its code has them."""

from collections.abc import Iterable, Sequence

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from .low_rank import LowRank

READINGS = ("code", "paper")


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions in float32; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_reading(reading: str) -> None:
    if reading not in READINGS:
        raise ValueError(f"reading must be one of {', '.join(READINGS)}, got {reading!r}")


@MODELS.register_module()
class FeatureDistillationLoss(nn.Module):
    r"""How far a student's tokens S_i are from its teacher's T_i after each of N blocks.

    .. math::
        \text{code:}\quad \frac{1}{N} \sum_{i=1}^{N} \mathrm{mean}\,(S_i - T_i)^2
        \qquad \text{paper (equation 4):}\quad \frac{1}{2N} \sum_{i=1}^{N} \|S_i - T_i\|^2

    The paper's is that of one image; a batch has the mean over its images. It is the code's times half the number of
    values that a block puts out, 197 x 768 / 2 for a ViT-B, so that one loss weight does not serve both. The code's is
    the default: alpha = 1 goes with it.

    Args:
        loss_weight: alpha.
        reading: 'code' or 'paper'.

    Raises:
        ValueError: an unknown ``reading``.
    """

    def __init__(self, loss_weight: float = 1.0, reading: str = "code") -> None:
        super().__init__()
        _check_reading(reading)
        self.loss_weight, self.reading = loss_weight, reading

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Either's tokens, one (B, ..., channels) per block -> a scalar, float32 or more. No gradient to the teacher.

        Raises:
            ValueError: another number of blocks, or tokens of another shape.
        """
        if len(student) != len(teacher):
            raise ValueError(f"the student has {len(student)} blocks, the teacher {len(teacher)}")
        total = student[0].new_zeros(())
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if s.shape != t.shape:
                raise ValueError(
                    f"block {i}: the student's tokens are {tuple(s.shape)}, the teacher's {tuple(t.shape)}"
                )
            squares = (at_least_float32(s) - at_least_float32(t.detach())).square()
            total = total + (squares.mean() if self.reading == "code" else squares.sum() / (2 * len(s)))
        return self.loss_weight * total / len(student)


@MODELS.register_module()
class WeightPerturbationLoss(nn.Module):
    r"""How far the product of each pair of factors is from the weight that it stands for, in its worst entry.

    .. math::
        d_k = \|V_k U_k^T - W_k\|_\infty, \qquad
        \text{code:}\quad \frac{1}{K} \sum_{k=1}^{K} (d_k - \epsilon)^2
        \qquad \text{paper (equation 6):}\quad \sum_{k=1}^{K} (d_k - \epsilon)

    The product is formed once, without a gradient, to find the worst entry; the loss is computed from that entry
    alone, one row of V and one of U: the same number and the same gradient, and nothing of W's size to keep for it.

    Args:
        loss_weight: beta.
        eps: the radius; neither reading stops at it, the code's even pulls a smaller d back to it.
        reading: 'code' or 'paper'.

    Raises:
        ValueError: an unknown ``reading``, or a negative ``eps``.
    """

    def __init__(self, loss_weight: float = 1.0, eps: float = 0.0, reading: str = "code") -> None:
        super().__init__()
        _check_reading(reading)
        if eps < 0:
            raise ValueError(f"eps must be 0 or more, got {eps}")
        self.loss_weight, self.eps, self.reading = loss_weight, eps, reading

    def forward(self, pairs: Iterable[tuple[LowRank, Tensor]]) -> Tensor:
        """(low-rank layer, the weight it stands for) -> a scalar, in float32 or more also under autocast."""
        distances = torch.stack([largest_perturbation(layer, weight) for layer, weight in pairs]) - self.eps
        return self.loss_weight * (distances.square().mean() if self.reading == "code" else distances.sum())


def largest_perturbation(layer: LowRank, weight: Tensor) -> Tensor:
    """The largest absolute entry of V U^T - W, a scalar that U and V get a gradient from. W is (out, in, ...)."""
    with torch.autocast(weight.device.type, enabled=False):
        U, V, weight = (at_least_float32(factor) for factor in (layer.U, layer.V, weight.detach().flatten(1)))
        with torch.no_grad():
            worst = torch.addmm(weight, V, U.T, beta=-1).abs_().argmax()
        row = torch.div(worst, weight.shape[1], rounding_mode="floor")
        col = worst % weight.shape[1]
        # index_select: no synchronisation with the device, as indexing by a number would need.
        entry = (V.index_select(0, row[None]) * U.index_select(0, col[None])).sum()
        return (entry - weight.flatten().index_select(0, worst[None])[0]).abs()
