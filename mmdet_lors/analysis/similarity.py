"""How alike features are that go through a stack of layers, and what that suggests for LORS's groups.

What is kept does not grow with the number of images: sums in float64, 8 (L C)^2 bytes for L places of C channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Similarity:
    r"""Similarities of the features at L places of a network, such as the inputs of a stack's layers.

    A token is a vector of C channels that exists at every place: a ViT's token, or a detector's query.

    Args:
        places: L.
        channels: C.
    """

    def __init__(self, places: int, channels: int) -> None:
        self.tokens = self.images = 0
        self._origin: Tensor | None = None
        self._sum = torch.zeros(places * channels, dtype=torch.float64)
        self._products = torch.zeros(places * channels, places * channels, dtype=torch.float64)
        self._cosines = torch.zeros(places, places, dtype=torch.float64)
        self._within_images = torch.zeros(places, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take the features of B images with N tokens each, (B, L, N, C)."""
        features = features.double()
        unit = F.normalize(features, dim=-1)
        self._cosines += torch.einsum("binc,bjnc->ij", unit, unit)
        self._within_images += mean_of_pairs(features.shape[2], unit.sum(2), unit.square().sum((2, 3))).sum(0)
        tokens = features.transpose(1, 2).flatten(2).flatten(0, 1)
        if self._origin is None:
            # Sums of differences from one token: exact where features do not vary, and less rounding elsewhere.
            self._origin = tokens[0]
        tokens = tokens - self._origin
        self._sum += tokens.sum(0)
        self._products += tokens.T @ tokens
        self.images += len(features)
        self.tokens += len(tokens)

    def cka(self) -> Tensor:
        r"""Linear centred kernel alignment of every place with every other, (L, L), each in [0, 1].

        .. math:: \|Y^T X\|_F^2 / (\|X^T X\|_F \|Y^T Y\|_F)

        X and Y are the features of all tokens at two places, (n, C), less their means (Kornblith et al., arXiv
        1905.00414). Features that do not vary have 0 with everything.
        """
        places = len(self._cosines)
        covariance = self._products - torch.outer(self._sum, self._sum) / self.tokens
        norms = covariance.view(places, -1, places, len(self._sum) // places).square().sum((1, 3))
        own = norms.diagonal().sqrt()
        return norms / torch.outer(own, own).clamp(min=torch.finfo(torch.float64).tiny)

    def cosine(self) -> Tensor:
        """Cosine between a token at one place and the same token at another, mean over tokens: (L, L)."""
        return self._cosines / self.tokens

    def within_images(self) -> Tensor:
        """Cosine between different tokens of an image, mean over pairs and images: (L,)."""
        return self._within_images / self.images


class ClassSimilarity:
    """Cosine between different instances of a class at L places, as of one image's feature and another's."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, Tensor, Tensor]] = {}

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take instances, (n, L, C), and their classes, (n,)."""
        unit = F.normalize(features.double(), dim=-1)
        for label in labels.unique().tolist():
            new = unit[labels == label]
            sums = len(new), new.sum(0), new.square().sum((0, 2))
            old = self._sums.get(label, (0, 0.0, 0.0))
            self._sums[label] = tuple(a + b for a, b in zip(old, sums, strict=True))

    def counts(self) -> dict[int, int]:
        """Class -> number of its instances."""
        return {label: count for label, (count, _, _) in sorted(self._sums.items())}

    def within(self) -> Tensor:
        """Mean over pairs of each class, in the order of :meth:`counts`, (classes, L); NaN for a single instance."""
        return torch.stack([mean_of_pairs(*self._sums[label]) for label in self.counts()])

    def overall(self) -> Tensor:
        """Mean over all pairs, of one class or two: (L,)."""
        return mean_of_pairs(*(sum(parts) for parts in zip(*self._sums.values(), strict=True)))


def mean_of_pairs(count: int, total: Tensor, squares: Tensor) -> Tensor:
    """Mean inner product of all pairs of different vectors, NaN if there is no pair.

    Args:
        count: number of vectors.
        total: their sum, (..., C).
        squares: sum of their squared norms, (...,).
    """
    return (total.square().sum(-1) - squares) / (count * (count - 1) or torch.nan)


def allocate(weights: Sequence[float], total: int) -> list[int]:
    """Integers that add up to ``total``: one each if they suffice, the rest in proportion to ``weights``.

    Fractions are settled by the largest remainders, ties by the first place. Equal weights if all are zero.
    """
    least = min(1, total // len(weights))
    spare = total - least * len(weights)
    whole = sum(weights)
    shares = [spare * (weight / whole if whole else 1 / len(weights)) for weight in weights]
    # The rounding hides that two remainders are equal but for the last bits.
    remainders = [round(share % 1, 9) for share in shares]
    found = [int(share) for share in shares]
    first = sorted(range(len(shares)), key=lambda i: -remainders[i])[: spare - sum(found)]
    return [least + found[i] + (i in first) for i in range(len(shares))]


def suggest(alike: Sequence[float], total: int, alike_more: bool) -> list[int]:
    """Groups per layer, K, from how alike the features are that enter each layer, with :func:`allocate`.

    The LORS paper (appendix A.1) has no formula: it gives attention more groups in layers whose inputs look alike, and
    MLPs in those whose inputs vary. Ours is linear: weights are the distance from the least similar layer, or from the
    most similar one.

    Args:
        alike: per layer, such as :meth:`Similarity.within_images` of its input.
        total: the sum of all K.
        alike_more: whether layers with similar features get more (attention), or those with different ones (MLPs).
    """
    least, most = min(alike), max(alike)
    return allocate([a - least if alike_more else most - a for a in alike], total)
