"""PELA's losses against their equations, written out; and the tokens that the first of them compares."""

import pytest
import timm
import torch
from mmdet.registry import MODELS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_lors.pela import FeatureDistillationLoss, LowRankLinear, WeightPerturbationLoss
from mmdet_lors.pela.tokens import block_names, record_tokens


def vit(**settings) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", **dict(dict(depth=2, embed_dim=24, num_heads=2, img_size=32), **settings)
    )


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 2), num_heads=(2, 4)
    )


def test_feature_distillation_in_both_readings():
    student, teacher = ([torch.randn(2, 5, 4), torch.randn(2, 3, 3, 8)] for _ in range(2))
    squares = [(s - t) ** 2 for s, t in zip(student, teacher, strict=True)]
    code = (squares[0].sum() / 40 + squares[1].sum() / 144) / 2
    paper = (squares[0].sum(dim=(1, 2)) + squares[1].sum(dim=(1, 2, 3))).mean() / (2 * 2)
    assert torch.allclose(FeatureDistillationLoss()(student, teacher), code)
    assert torch.allclose(FeatureDistillationLoss(loss_weight=3.0, reading="paper")(student, teacher), 3 * paper)


def test_feature_distillation_moves_the_student_alone_and_counts_in_float32():
    student, teacher = (torch.full((1, 2, 3), value, dtype=torch.float16, requires_grad=True) for value in (300.0, 0.0))
    loss = FeatureDistillationLoss()([student], [teacher])
    assert loss.item() == 90_000
    loss.backward()
    assert student.grad is not None and teacher.grad is None


def test_feature_distillation_refuses_models_that_do_not_match():
    tokens = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="the student has 1 blocks, the teacher 2"):
        FeatureDistillationLoss()([tokens], [tokens] * 2)
    with pytest.raises(ValueError, match=r"block 1: the student's tokens are \(1, 2, 3\), the teacher's \(1, 3, 2\)"):
        FeatureDistillationLoss()([tokens] * 2, [tokens, tokens.mT])


def pairs(*shapes: tuple[int, int]) -> list[tuple[LowRankLinear, torch.Tensor]]:
    """Low-rank layers (out, in), and weights they do not equal."""
    return [(LowRankLinear(cols, rows, 2), torch.randn(rows, cols)) for rows, cols in shapes]


@pytest.mark.parametrize("reading", ["code", "paper"])
def test_weight_perturbation_and_its_gradient_in_both_readings(reading):
    layers = pairs((6, 9), (8, 3))
    distances = torch.stack([(layer.V @ layer.U.T - weight).abs().max() for layer, weight in layers])
    expected = {"code": ((distances - 0.1) ** 2).mean(), "paper": (distances - 0.1).sum()}[reading]
    loss = WeightPerturbationLoss(loss_weight=2.0, eps=0.1, reading=reading)(layers)
    assert torch.allclose(loss, 2 * expected)
    factors = [factor for layer, _ in layers for factor in (layer.U, layer.V)]
    ours, theirs = (torch.autograd.grad(value, factors) for value in (loss, 2 * expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


class Products(TorchDispatchMode):
    """Counts matrix products whose result has one of these shapes."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shapes, self.count = {shape, shape[::-1]}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and tuple(out.shape) in self.shapes:
            self.count += 1
        return out


def test_the_product_is_formed_once_forward_and_backward_together():
    layers = pairs((6, 9))
    with Products((6, 9)) as products:
        WeightPerturbationLoss()(layers).backward()
    assert products.count == 1


def test_weight_perturbation_stays_in_float32_under_autocast():
    layers = pairs((6, 9))
    expected = WeightPerturbationLoss()(layers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(WeightPerturbationLoss()(layers), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(type="FeatureDistillationLoss", reading="article"), "reading must be one of code, paper, got 'article'"),
        (dict(type="WeightPerturbationLoss", reading="article"), "reading must be one of code, paper, got 'article'"),
        (dict(type="WeightPerturbationLoss", eps=-1), "eps must be 0 or more, got -1"),
    ],
)
def test_losses_refuse(config, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(config)


def test_tokens_of_a_vit():
    model = vit().eval()
    assert block_names(model) == ["blocks.0", "blocks.1"]
    x = torch.randn(3, 3, 32, 32)
    with record_tokens(model) as tokens:
        model(x)
    assert [t.shape for t in tokens] == [(3, 5, 24)] * 2
    assert torch.equal(model.norm(tokens[-1]), model.forward_features(x))
    model(x)
    assert len(tokens) == 2 and not model.blocks[0]._forward_hooks


def test_tokens_of_a_swin():
    model = swin()
    assert block_names(model) == ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]
    with record_tokens(model) as tokens:
        model(torch.randn(2, 3, 32, 32))
    assert [t.shape for t in tokens] == [(2, 8, 8, 12), (2, 4, 4, 24), (2, 4, 4, 24)]


def test_hooks_are_gone_after_an_error():
    model = vit()
    with pytest.raises(AssertionError), record_tokens(model):
        model(torch.randn(2, 3, 8, 8))
    assert not model.blocks[0]._forward_hooks


def test_a_pattern_that_matches_nothing_says_what_there_is():
    with pytest.raises(ValueError, match=r"blocks 'stage' matches no module; the model has .*blocks.\*"):
        block_names(vit(), "stage")
