"""A folded detector equals the factored one, on disk and in memory."""

from copy import deepcopy

import pytest
import torch
from conftest import LORS_DIGITS, load_config, random_lors
from golden import load, model_config, relative_error, samples
from mmdet.registry import MODELS

from mmdet_lors.conversion.folding import folded_config, folded_state_dict
from mmdet_lors.lors.serving import serve


def folded(model, model_cfg, dtype):
    plain = MODELS.build(folded_config(model_cfg)).to(dtype).eval()
    plain.load_state_dict(folded_state_dict(model, dtype))
    return plain


def test_folded_decoder_equals_factored_on_the_golden_decoder():
    golden, model = load("lors")
    plain = folded(model.eval(), model_config(golden), torch.float64)
    assert plain.decoder.lorsa is None and plain.decoder.lorst is None
    queries = model.query_generator(golden["image_sizes"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model.decoder.predict(golden["feats"], *queries, samples(golden))
    served = serve(model).decoder.predict(golden["feats"], *queries, samples(golden))
    for found in (plain.decoder.predict(golden["feats"], *queries, samples(golden)), served):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.labels, theirs.labels)
            assert relative_error(ours.scores, theirs.scores) < 1e-9
            assert relative_error(ours.bboxes, theirs.bboxes) < 1e-9
    after = model.train().state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_folded_equals_factored_at_full_size_in_float32():
    cfg = load_config("configs/lors/adamixer-lors_r50_100-queries_1x_coco.py").model
    cfg.backbone.depth, cfg.neck.in_channels = 18, [64, 128, 256, 512]
    model = random_lors(cfg)
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        expected = model._forward(images)[-1]
        found = folded(model, cfg, torch.float32)._forward(images)[-1]
    assert relative_error(found.cls_score.sigmoid(), expected.cls_score.sigmoid()) < 1e-4
    assert relative_error(found.bboxes, expected.bboxes) < 1e-4


@pytest.mark.parametrize("lors", [dict(static=None), dict(adaptive=None), dict(adaptive=dict(groups=0))])
def test_each_half_folds_alone(lors):
    cfg = load_config(LORS_DIGITS)
    cfg.merge_from_dict(dict(model=dict(decoder=dict(lors=lors))))
    model = random_lors(cfg.model)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model._forward(images)[-1]
        for found in (folded(model, cfg.model, torch.float32), serve(model)):
            assert torch.allclose(found._forward(images)[-1].bboxes, expected.bboxes, rtol=1e-4, atol=1e-3)


def test_training_after_serving_is_the_same_to_the_last_bit():
    """One step, with and without an evaluation in serving mode before it."""
    cfg = load_config(LORS_DIGITS)
    first = random_lors(cfg.model)
    second = deepcopy(first)
    images = torch.randn(2, 3, 64, 96)
    serve(first.eval())
    with torch.no_grad():
        first._forward(images)
    for model in (first, second):
        model.train()
        sum(o.cls_score.square().sum() + o.xyzr.square().sum() for o in model._forward(images)).backward()
        torch.optim.SGD(model.parameters(), lr=1e-6).step()
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_serving_changes_no_state_dict():
    model = random_lors(load_config(LORS_DIGITS).model)
    keys = list(model.state_dict())
    assert list(serve(model).state_dict()) == keys
    assert model.decoder.lorsa.folded is not None
    assert serve(model, False).decoder.lorsa.folded is None


@torch.no_grad()
@pytest.mark.parametrize("halves", [["lorsa"], ["lorst"], ["lorsa", "lorst"]])
def test_a_pass_never_goes_by_old_weights(halves):
    """Written through ``data``, they have no new version: the pass finds it out at its end, and is done again."""
    golden, model = load("lors")
    queries = model.eval().query_generator(golden["image_sizes"])
    serve(model).decoder(golden["feats"], *queries)
    for half in halves:
        next(getattr(model.decoder, half).parameters()).data.mul_(1.5)
    found = model.decoder(golden["feats"], *queries)
    expected = serve(model, False).decoder(golden["feats"], *queries)
    assert len(found) == len(expected)
    assert all(relative_error(a.bboxes, b.bboxes) < 1e-9 for a, b in zip(found, expected, strict=True))
