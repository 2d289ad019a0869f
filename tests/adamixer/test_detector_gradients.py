"""The detector's gradients with LORS are those of weights by their equations, whatever else asked for gradients."""

import copy
from types import MethodType

import pytest
import torch
from conftest import LORS_DIGITS, data_samples, load_config, random_lors
from disturbances import DISTURBANCES, gradients, largest_difference
from torch import Tensor, nn

from mmdet_lors.adamixer import mixing


def plain_lorsa(self, query: Tensor, layer: int, folded: None) -> list[Tensor]:
    """Equations 9 to 12, group by group."""
    private, sizes = self.private[layer], [rows * cols for rows, cols in self.shapes]
    flat = (query @ self.shared.weight.T + self.shared.bias).unflatten(-1, (self.copies, -1)).split(sizes, -1)
    r, K = private.rank, private.groups
    E = (query @ private.E.weight.T + private.E.bias).unflatten(-1, (self.copies, K, len(sizes), r, r))
    weights = []
    for s, shape in enumerate(self.shapes):
        groups = [slice(k * r, (k + 1) * r) for k in range(K)]
        added = [private.B[s][:, :, g] @ E[..., k, s, :, :] @ private.A[s][:, g] for k, g in enumerate(groups)]
        weights.append(flat[s].unflatten(-1, shape) + sum(added))
    return weights


def plain_lorst(self, x: Tensor, layer: int, folded: None) -> Tensor:
    """Equations 7 and 8."""
    weight = self.shared + self.private[layer].B @ self.private[layer].A
    return x @ weight.T + self.bias[layer]


def detector(adaptive: str, static: str) -> nn.Module:
    cfg = load_config(LORS_DIGITS)
    cfg.model.decoder.lors.adaptive.path, cfg.model.decoder.lors.static.path = adaptive, static
    model = random_lors(cfg.model).double()
    # Boxes of their own, without which the matching is a tie that rounding decides.
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def plain(model: nn.Module, monkeypatch) -> nn.Module:
    """The same detector with weights by their equations, nothing computed twice."""
    model = copy.deepcopy(model)
    model.decoder.lorsa.forward = MethodType(plain_lorsa, model.decoder.lorsa)
    model.decoder.lorst.forward = MethodType(plain_lorst, model.decoder.lorst)
    monkeypatch.setattr(mixing, "recompute", lambda function, *args, instead_of: function(*args))
    return model


def after(disturb, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    samples = data_samples([3, 2], (64, 64), 10)
    last = model.decoder.lorst.private[-1]
    watched = [model.decoder.lorsa.shared.weight, last.A, last.B]
    if disturb.__name__ == "gradient_penalty":  # mmcv's and PyTorch's sampling is differentiable once
        watched = [last.A, last.B]

    def loss(x: Tensor) -> Tensor:
        losses = model.loss(x, samples)
        return sum(value for name, value in losses.items() if "loss" in name)

    return gradients(disturb, model, loss, images, watched)


@pytest.mark.parametrize("paths", [("weights", "features"), ("fold", "fold")])
def test_gradients_are_those_of_plain_products(paths, monkeypatch):
    model = detector(*paths)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    found = {}
    for disturb in DISTURBANCES:
        torch.manual_seed(1)
        found[disturb] = after(disturb, model, images)
    model = plain(model, monkeypatch)
    for disturb, ours in found.items():
        torch.manual_seed(1)
        assert largest_difference(ours, after(disturb, model, images)) < 1e-12, disturb
