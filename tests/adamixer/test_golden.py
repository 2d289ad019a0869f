"""Ours against numbers recorded from the reference implementations, in float64."""

import math

import pytest
import torch
from golden import DATA, NAMES, load, model_config, relative_error, samples
from mmdet.registry import MODELS
from torch import nn

from mmdet_lors.adamixer.boxes import position_encoding
from mmdet_lors.adamixer.sampling import AdaptiveSampling, sample_3d
from mmdet_lors.adamixer.sampling.backends import arrange
from mmdet_lors.conversion.reference import DROPPED, convert, rename

OPERATOR, STAGE = 1e-9, 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_initial_queries(name):
    golden, model = load(name)
    xyzr, content = model.query_generator(golden["image_sizes"])
    assert relative_error(xyzr, golden["query_xyzr"]) < OPERATOR
    assert relative_error(content, golden["query_content"]) < OPERATOR


@pytest.mark.parametrize("name", NAMES)
def test_position_encoding(name):
    golden, _ = load(name)
    encoding = position_encoding(golden["query_xyzr"], golden["params"]["C"])
    assert relative_error(encoding, golden["op_pe"]) < OPERATOR


@pytest.mark.parametrize("backend", ["grid_sample", "embedding_bag", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_sampling(name, backend):
    golden, model = load(name)
    expected, sampling = golden["op_sampling"], model.decoder.stages[0].sampling
    content, xyzr = golden["query_content"], golden["query_xyzr"]
    assert relative_error(sampling.offset(content), expected["offset"]) < OPERATOR
    points = sampling.points(content, xyzr)
    assert relative_error(points.flatten(2, 3)[:, :, None], expected["sample_points"]) < OPERATOR
    pyramid = arrange(golden["feats"], golden["featmap_strides"], golden["params"]["groups"], backend)
    sampled = sample_3d(pyramid, points)
    assert relative_error(sampled, expected["sampled"]) < OPERATOR


def test_mixing_adamixer():
    golden, model = load("adamixer")
    mixing = model.decoder.stages[0].mixing
    mixing.norm = nn.Identity()
    out = mixing(golden["op_sampling"]["sampled"], golden["query_content"])
    assert relative_error(out, golden["op_mixing"]["out"]) < OPERATOR


def test_mixing_lors_of_every_stage():
    golden, model = load("lors")
    decoder = model.decoder
    for i, (stage, expected) in enumerate(zip(decoder.stages, golden["op_mixing"]["out"], strict=True)):
        out = stage.mixing(
            golden["op_sampling"]["sampled"],
            golden["query_content"],
            lambda q, i=i: decoder.lorsa(q, i),
            lambda x, i=i: decoder.lorst(x, i),
        )
        assert relative_error(out, expected) < OPERATOR


@pytest.mark.parametrize("name", NAMES)
def test_stages(name):
    golden, model = load(name)
    outputs = model.decoder(golden["feats"], *model.query_generator(golden["image_sizes"]))
    for ours, theirs in zip(outputs, golden["stages"], strict=True):
        assert relative_error(ours.cls_score, theirs["cls_score"]) < STAGE
        assert relative_error(ours.xyzr, theirs["query_xyzr"]) < STAGE
        assert relative_error(ours.bboxes, theirs["bboxes"]) < STAGE
        assert relative_error(ours.content, theirs["query_content"]) < STAGE


@pytest.mark.parametrize("name", NAMES)
def test_detections(name):
    golden, model = load(name)
    queries = model.query_generator(golden["image_sizes"])
    results = model.decoder.predict(golden["feats"], *queries, samples(golden))
    for ours, theirs in zip(results, golden["detections"], strict=True):
        assert len(ours) == sum(len(rows) for rows in theirs)
        for label, rows in enumerate(theirs):
            of_class = ours[ours.labels == label]
            found = torch.cat([of_class.bboxes, of_class.scores[:, None]], dim=1)
            rows = rows[rows[:, 4].argsort(descending=True)].reshape(-1, 5)
            assert found.shape == rows.shape
            if len(rows):
                assert relative_error(found, rows) < STAGE


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients(name):
    golden, model = load(name)
    feats = [f.clone().requires_grad_() for f in golden["feats"]]
    queries = model.query_generator(golden["image_sizes"])
    losses = model.decoder.loss(feats, *queries, samples(golden))
    assert losses.keys() == golden["losses"].keys()
    for key, expected in golden["losses"].items():
        assert losses[key].item() == pytest.approx(expected, rel=STAGE), key

    sum(v for k, v in losses.items() if "loss" in k).backward()
    recorded = {k: v for k, v in golden["grads"].items() if k not in DROPPED}
    expected = convert(recorded, golden["params"]["groups"])
    for key, parameter in model.named_parameters():
        if key.startswith(("backbone.", "neck.")):
            continue
        assert parameter.grad is not None, f"{key} has no gradient"
        # Stage 0's boxes are all alike, so its tau has no gradient but rounding, 1e-18.
        difference = (parameter.grad - expected[key]).norm()
        assert difference < STAGE * expected[key].norm() + 1e-15, key
    for feat, norm in zip(feats, golden["feat_grad_norm"], strict=True):
        assert feat.grad.norm().item() == pytest.approx(norm, rel=STAGE)


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_match_the_reference_after_the_whole_detectors_init(name):
    """Mean and standard deviation of every tensor, within what two samples of its size may differ by."""
    golden = torch.load(DATA / f"{name}_decoder.pt")
    model = MODELS.build(model_config(golden))
    model.init_weights()
    ours = {k: v.detach().double() for k, v in model.named_parameters() if not k.startswith("backbone.")}
    for key, (mean, std) in golden["init_stats"].items():
        if key in DROPPED:
            continue
        weight = ours.pop(rename(key, dict(cls=1, reg=1)))
        if std == 0:
            assert torch.allclose(weight, torch.full_like(weight, mean), atol=1e-6), key
            continue
        assert std > 0 and weight.std() > 0, key
        margin = 6 * std * math.sqrt(2 / weight.numel())
        assert abs(weight.mean().item() - mean) < margin, key
        assert abs(weight.std().item() - std) < margin, key
    assert not ours, f"initialised, but not in the reference: {list(ours)}"


def test_offsets_of_a_square_number_of_points_start_as_a_regular_grid():
    sampling = AdaptiveSampling(16, num_groups=2, num_points=4)
    sampling.init_weights()
    bias = sampling.offset.bias.view(2, 4, 3)
    grid = torch.tensor([[-0.25, -0.25, -1.0], [0.25, -0.25, -1.0], [-0.25, 0.25, -1.0], [0.25, 0.25, -1.0]])
    assert torch.equal(bias[0], grid) and torch.equal(bias[1], grid)
    assert not sampling.offset.weight.any()
