"""Mixed precision and compilation of the decoder agree with plain float32."""

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, data_samples, load_config
from mmdet.registry import MODELS
from test_detector import total_loss

from mmdet_lors.adamixer import decoder, mixing, sampling, stage
from mmdet_lors.adamixer.sampling import backends

SIZE = (64, 96)


def build(name: str, **decoder):
    torch.manual_seed(0)
    cfg = load_config(name)
    cfg.merge_from_dict({f"model.decoder.{k}": v for k, v in decoder.items()})
    model = MODELS.build(cfg.model)
    model.init_weights()
    for parameter in model.decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def step(model) -> tuple[dict, dict]:
    """Losses and gradients of the decoder on fixed images and objects."""
    torch.manual_seed(1)
    images, samples = torch.randn(2, 3, *SIZE), data_samples([3, 2], SIZE, 10)
    losses = model.loss(images, samples)
    model.zero_grad()
    total_loss(losses).backward()
    grads = {k: p.grad.clone() for k, p in model.decoder.named_parameters()}
    return {k: v.detach() for k, v in losses.items()}, grads


def distance(ours: dict, theirs: dict) -> float:
    """Of all gradients together, relative."""
    difference = sum((ours[k].float() - theirs[k]).square().sum() for k in theirs).sqrt()
    return (difference / sum(g.square().sum() for g in theirs.values()).sqrt()).item()


def cosine(ours: dict, theirs: dict) -> float:
    """Of all gradients together."""
    a, b = (torch.cat([grads[k].flatten().float() for k in theirs]) for grads in (ours, theirs))
    return torch.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS])
@pytest.mark.parametrize(
    ("dtype", "logits", "pixels", "loss", "angle"),
    [(torch.bfloat16, 2e-2, 2.0, 1e-2, 0.9), (torch.float16, 2e-3, 0.2, 1e-3, 0.99)],
)
def test_autocast_agrees_with_float32(name, dtype, logits, pixels, loss, angle):
    """bfloat16 has 8 significant bits, float16 11. The matching is held, for one match that flips changes everything.

    Gradients agree in direction only: a sampling point that moves into the next cell gets another gradient.
    """
    model = build(name)
    assign, images = model.decoder.assign, torch.randn(2, 3, *SIZE)
    held = []
    model.decoder.assign = lambda *args: held.append(assign(*args)) or held[0]
    losses, grads = step(model)
    outputs = model._forward(images)
    with torch.autocast("cpu", dtype=dtype):
        half_losses, half_grads = step(model)
        half_outputs = model._forward(images)
    for half, full in zip(half_outputs, outputs, strict=True):
        assert (half.cls_score - full.cls_score).norm() < logits * full.cls_score.norm()
        assert (half.bboxes - full.bboxes).abs().max() < pixels
    total, half_total = total_loss(losses), total_loss(half_losses)
    assert half_total.dtype == torch.float32 and abs(half_total - total) < loss * total
    assert all(torch.isfinite(g).all() for g in half_grads.values())
    assert cosine(half_grads, grads) > angle


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS])
def test_what_must_stay_in_float32_under_autocast(name, monkeypatch):
    """Boxes, IoF, coordinates, level weights and logits; the mixing's products do run in half."""
    seen = {}

    def spy(module, function):
        original = getattr(module, function)

        def watched(*args):
            out = original(*args)
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            seen.setdefault(function, set()).update(t.dtype for t in tensors)
            return out

        monkeypatch.setattr(module, function, watched)

    spy(stage, "log_iof")
    spy(stage, "refine_xyzr")
    spy(backends, "level_weights")
    spy(sampling, "sample_3d")
    spy(decoder, "xyzr_to_xyxy")
    model = build(name).eval()
    spy(mixing, "adaptive_channel_mixing")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model._forward(torch.randn(2, 3, *SIZE))
    assert torch.bfloat16 in seen.pop("adaptive_channel_mixing")
    assert len(seen) == 5 and all(dtypes == {torch.float32} for dtypes in seen.values()), seen
    for output in outputs:
        assert {output.cls_score.dtype, output.xyzr.dtype, output.bboxes.dtype} == {torch.float32}


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS])
def test_compiled_stages_agree_and_are_one_graph_each(name):
    """fullgraph=True raises at any break; 1e-5 in float32."""
    losses, grads = step(build(name))
    compiled = build(name, compile=dict(backend="aot_eager"))
    assert list(compiled.state_dict()) == list(build(name).state_dict())
    compiled_losses, compiled_grads = step(compiled)
    for key, value in losses.items():
        assert torch.allclose(compiled_losses[key], value, rtol=1e-5), key
    assert distance(compiled_grads, grads) < 1e-5
    torch.compiler.reset()


def test_compile_takes_arguments_and_refuses_others():
    with pytest.raises(TypeError, match="colour"):
        build(PLAIN_DIGITS, compile=dict(colour="red"))
