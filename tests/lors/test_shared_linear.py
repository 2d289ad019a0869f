"""A shared weight whose gradient adds up in one buffer gets the gradient that autograd would give it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_lors.lors.shared_linear import SharedWeight

LAYERS = 3


def parameters(rank: int = 2) -> dict[str, list[Tensor]]:
    def new(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    found = dict(W=[new(5, 5)], b=[new(5) for _ in range(LAYERS)], x=[new(2, 4, 5)])
    return found | dict(A=[new(rank, 5) for _ in range(LAYERS)], B=[new(5, rank) for _ in range(LAYERS)])


def plain(p: dict[str, list[Tensor]], low_rank: bool) -> Tensor:
    x = p["x"][0]
    for i in range(LAYERS):
        weight = p["W"][0] + p["B"][i] @ p["A"][i] if low_rank else p["W"][0]
        x = torch.tanh(F.linear(x, weight, p["b"][i]))
    return x


def shared(p: dict[str, list[Tensor]], low_rank: bool) -> Tensor:
    weight, x = SharedWeight.of(p["W"][0]), p["x"][0]
    for i in range(LAYERS):
        residual = (p["A"][i], p["B"][i]) if low_rank else ()
        x = torch.tanh(weight.linear(x, p["b"][i], *residual))
    return x


def gradients(out: Tensor, p: dict[str, list[Tensor]], extra: Tensor | float = 0.0) -> list[Tensor | None]:
    inputs = [t for group in p.values() for t in group]
    return torch.autograd.grad(out.square().sum() + extra, inputs, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("low_rank", [True, False])
def test_value_and_gradients_are_autograds(low_rank):
    p = parameters()
    ours, theirs = shared(p, low_rank), plain(p, low_rank)
    assert torch.allclose(ours, theirs, atol=1e-14)
    for _ in range(2):  # A second backward pass through the same graph starts from an empty buffer.
        for found, expected in zip(gradients(ours, p), gradients(theirs, p), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.allclose(found, expected, atol=1e-13)


def test_a_weight_that_is_used_elsewhere_too_gets_both_gradients():
    p = parameters()
    extra = p["W"][0].square().sum()
    found, expected = gradients(shared(p, True), p, extra)[0], gradients(plain(p, True), p, extra)[0]
    assert torch.allclose(found, expected, atol=1e-13)


def test_frozen_parts():
    p = parameters()
    for frozen in ("A", "x"):
        p[frozen][0].requires_grad_(False)
        (out, expected), inputs = (shared(p, True), plain(p, True)), [p["B"][0], p["b"][2]]
        found, theirs = (torch.autograd.grad(o.square().sum(), inputs) for o in (out, expected))
        assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(found, theirs, strict=True))


def test_no_buffer_where_it_would_not_help():
    weight = torch.randn(5, 5, requires_grad=True)
    assert SharedWeight.of(weight) is not None
    assert SharedWeight.of(weight.detach()) is None and SharedWeight.of(weight.to("meta")) is None
    with torch.no_grad():
        assert SharedWeight.of(weight) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert SharedWeight.of(weight) is None
