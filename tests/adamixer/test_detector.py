"""The whole detector: sizes, gradients, losses, predictions, and the settings it refuses."""

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, data_samples, load_config
from mmdet.registry import MODELS
from mmengine.structures import InstanceData

from mmdet_lors.errors import UserError

R50 = "configs/adamixer/adamixer_r50_100-queries_1x_coco.py"
R50_LORS = "configs/lors/adamixer-lors_r50_100-queries_1x_coco.py"


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build(name: str, **decoder):
    cfg = load_config(name)
    cfg.merge_from_dict({f"model.decoder.{k}": v for k, v in decoder.items()})
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def total_loss(losses: dict) -> torch.Tensor:
    return sum(v for k, v in losses.items() if "loss" in k)


@pytest.mark.parametrize(
    ("name", "total", "decoder"), [(R50, 134_790_904, 110_272_296), (R50_LORS, 59_866_872, 35_348_264)]
)
def test_parameters_of_the_r50_models(name, total, decoder):
    """The reference's counts, but for its 4 constant position values per query, which we do not store."""
    model = MODELS.build(load_config(name).model)
    assert count(model) == total - 4 * 100
    assert count(model.decoder) == decoder
    assert count(model.backbone) == 23_508_032
    assert count(model.neck) == 984_576
    assert count(model.query_generator) == 26_000 - 4 * 100


def test_parameters_inside_the_lors_decoder():
    decoder = MODELS.build(load_config(R50_LORS).model).decoder
    shared_weight = decoder.lorst.shared.numel()
    assert count(decoder.lorsa.shared) == 12_632_064
    assert count(decoder.lorsa.private) == 3_330_048
    assert shared_weight == 8_388_608
    assert count(decoder.lorst) - shared_weight == 1_586_688
    assert count(decoder.stages) == 9_410_856


def test_full_size_lors_trains_one_step_at_320():
    model = build(R50_LORS)
    model.train()
    losses = model.loss(torch.randn(1, 3, 320, 320), data_samples([3], (320, 320), 80))
    total = total_loss(losses)
    total.backward()
    assert torch.isfinite(total)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


LORS = [
    None,
    dict(adaptive=dict(rank=4, groups=[1, 1, 2])),
    dict(static=dict(rank=[1, 2, 3], groups=2)),
    dict(adaptive=dict(rank=4, groups=0), static=dict(rank=4, groups=0)),
    dict(adaptive=dict(rank=4, groups=[0, 2, 1]), static=dict(rank=4, groups=[1, 0, 2])),
    dict(adaptive=dict(rank=4, shared=False), static=dict(rank=4, shared=False)),
    dict(adaptive=dict(rank=[2, 3, 4], shared_init="kaiming")),
]


@pytest.mark.parametrize("lors", LORS)
def test_every_parameter_gets_a_gradient(lors):
    """So distributed training needs no find_unused_parameters; every case of the ablations builds and trains."""
    model = build(PLAIN_DIGITS, lors=lors)
    model.train()
    losses = model.loss(torch.randn(2, 3, 96, 96), data_samples([2, 3], (96, 96), 10))
    total_loss(losses).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("num_stages", [1, 3, 9, 12])
def test_any_number_of_stages(num_stages):
    lors = dict(adaptive=dict(rank=4, groups=1), static=dict(rank=2))
    model = build(PLAIN_DIGITS, num_stages=num_stages, lors=lors)
    losses = model.loss(torch.randn(1, 3, 96, 96), data_samples([2], (96, 96), 10))
    assert f"stage{num_stages - 1}_loss_cls" in losses and f"stage{num_stages}_loss_cls" not in losses


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS])
@pytest.mark.parametrize("num_boxes", [[0, 0], [0, 3]])
def test_images_without_objects_give_finite_losses_and_gradients(name, num_boxes):
    model = build(name)
    model.train()
    losses = model.loss(torch.randn(2, 3, 96, 96), data_samples(num_boxes, (96, 96), 10))
    assert all(torch.isfinite(v).all() for v in losses.values())
    total_loss(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_more_objects_than_queries():
    model = build(LORS_DIGITS)
    losses = model.loss(torch.randn(1, 3, 96, 96), data_samples([30], (96, 96), 10))
    assert torch.isfinite(total_loss(losses))


def test_predictions_are_the_best_over_queries_and_classes_in_original_pixels():
    model = build(LORS_DIGITS).eval()
    samples = data_samples([1, 2], (96, 96), 10)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        plain = [s.pred_instances for s in model.predict(images, samples, rescale=False)]
        for sample in samples:
            sample.set_metainfo(dict(scale_factor=(0.5, 2.0)))
        rescaled = [s.pred_instances for s in model.predict(images, samples)]
        last = model(images, samples, mode="tensor")[-1]
    for b in range(2):
        scores = last.cls_score[b].sigmoid()
        best = scores.flatten().topk(20)
        assert torch.equal(plain[b].scores, best.values)
        assert torch.equal(plain[b].labels, best.indices % 10)
        assert torch.equal(plain[b].bboxes, last.bboxes[b][best.indices // 10])
        factor = torch.tensor([2.0, 0.5, 2.0, 0.5])
        assert torch.allclose(rescaled[b].bboxes, plain[b].bboxes * factor)


def test_images_of_a_batch_do_not_see_each_other():
    """Each image's queries start from its own size, whatever the batch is padded to."""
    model = build(LORS_DIGITS).eval().double()
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        alone = model(image, data_samples([0], (96, 64), 10), mode="tensor")[-1]
        both = model(
            torch.cat([image, torch.randn_like(image)]),
            [*data_samples([0], (96, 64), 10), *data_samples([0], (96, 96), 10)],
            mode="tensor",
        )[-1]
    assert torch.allclose(alone.bboxes[0], both.bboxes[0], atol=1e-9)
    assert torch.allclose(alone.cls_score[0], both.cls_score[0], atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("channels_last", "laid_out"), [("cpu", True), (True, True), (False, False)])
def test_images_are_channels_last_on_a_cpu(channels_last, laid_out):
    cfg, images = load_config(LORS_DIGITS).model, torch.randn(2, 3, 96, 96)
    model = MODELS.build(dict(cfg, channels_last=channels_last)).eval()
    assert model.extract_feat(images)[0].is_contiguous(memory_format=torch.channels_last) == laid_out
    found = model(images, mode="tensor")[-1]
    model.channels_last = not laid_out
    assert torch.allclose(model(images, mode="tensor")[-1].bboxes, found.bboxes, rtol=1e-4, atol=1e-3)
    model.to(memory_format=torch.channels_last)  # its weights as well
    ours = model(images.contiguous(memory_format=torch.channels_last), mode="tensor")[-1]
    assert torch.allclose(ours.bboxes, found.bboxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder.lors": dict(adaptive=dict(groups=[1, 1]))},
            "lors.adaptive.groups has 2 entries for 3 stages",
        ),
        (
            {"decoder.lors": dict(static=dict(groups=[1] * 5))},
            "lors.static.groups has 5 entries for 3 stages",
        ),
        ({"decoder.lors": dict(adaptive=dict(rank=0))}, "lors.adaptive.rank must be 1 or more, got 0"),
        ({"decoder.lors": dict(static=dict(rank=-3))}, "lors.static.rank must be 1 or more, got -3"),
        ({"decoder.lors": dict(adaptive=dict(ranks=3))}, "lors.adaptive.ranks is unknown; known: rank"),
        ({"decoder.lors": dict(dynamic=dict(rank=3))}, "lors.dynamic is unknown; known: adaptive, static"),
        ({"decoder.lors": dict(adaptive=4)}, "lors.adaptive must be a dict, got 4"),
        ({"decoder.lors": {}}, "lors is empty: name 'adaptive', 'static' or both, or set lors=None"),
        (
            {"train_cfg.assigner": dict(_delete_=True, type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5)},
            "HungarianAssigner",
        ),
        ({"channels_last": "gpu"}, "model.channels_last must be True, False or 'cpu', got 'gpu'"),
        ({"decoder.stage.num_groups": 3}, "feat_channels 64 is not divisible by num_groups 3"),
        ({"decoder.stage.num_heads": 7}, "content_dim 64 is not divisible by num_heads 7"),
        ({"decoder.featmap_strides": [4, 8]}, "featmap_strides has 2 entries for 3 neck levels"),
        ({"neck.out_channels": 32}, "neck.out_channels 32 differs from decoder.stage.feat_channels 64"),
        (
            {"query_generator.content_dim": 32},
            "query_generator.content_dim 32 differs from decoder.stage.content_dim 64",
        ),
    ],
)
def test_refuses(changes, message):
    cfg = load_config(PLAIN_DIGITS)
    cfg.merge_from_dict({f"model.{k}": v for k, v in changes.items()})
    with pytest.raises(UserError) as error:
        MODELS.build(cfg.model)
    assert message in str(error.value)


def test_refuses_levels_that_do_not_fit_at_run_time():
    model = build(PLAIN_DIGITS)
    xyzr, content = model.query_generator([(96, 96)])
    with pytest.raises(UserError, match="featmap_strides has 3 entries for 1 feature levels"):
        model.decoder([torch.zeros(1, 64, 24, 24)], xyzr, content)
    with pytest.raises(UserError, match="neck.in_channels has 3 entries, the backbone gives 1 levels"):
        model.neck([torch.zeros(1, 32, 24, 24)])


@pytest.mark.parametrize("num_boxes", [[3, 1, 5], [0, 4, 0], [0, 0, 0], [30, 0, 2]])
def test_matching_all_stages_at_once_equals_the_assigner_called_for_each(num_boxes):
    """Labels and boxes of every query, against mmdet's HungarianAssigner stage by stage and image by image."""
    model = build(PLAIN_DIGITS)
    decoder = model.decoder
    for stage in decoder.stages:
        torch.nn.init.normal_(stage.reg_branch[-1].weight, std=0.1)
    samples = data_samples(num_boxes, (96, 96), 10)
    outputs = model(torch.randn(3, 3, 96, 96), samples, mode="tensor")
    matching = decoder.assign(outputs, samples)
    for s, output in enumerate(outputs):
        for b, sample in enumerate(samples):
            gt = sample.gt_instances
            predicted = InstanceData(scores=output.cls_score[b].detach(), bboxes=output.bboxes[b].detach())
            index = decoder.assigner.assign(predicted, gt, img_meta=sample.metainfo).gt_inds
            matched = index > 0
            assert matched.sum() == min(20, num_boxes[b])
            here = matching.queries[s] // 20 == b
            assert torch.equal(matching.queries[s][here] - 20 * b, matched.nonzero().squeeze(1))
            assert torch.equal(matching.labels[s][here], gt.labels[index[matched] - 1])
            assert torch.equal(matching.boxes[s][here], gt.bboxes[index[matched] - 1])
