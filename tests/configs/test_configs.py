"""What the config files build is what the papers say."""

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, load_config
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, build_from_cfg
from torch import nn

COCO = ["configs/adamixer/adamixer_r50_100-queries_1x_coco.py", "configs/lors/adamixer-lors_r50_100-queries_1x_coco.py"]


@pytest.mark.parametrize("name", COCO)
def test_coco_1x(name):
    cfg = load_config(name)
    assert cfg.train_dataloader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=2.5e-5, weight_decay=1e-4, fused=True)
    assert cfg.optim_wrapper.clip_grad.max_norm == 1.0
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.end, warm_up.by_epoch) == ("LinearLR", 0.001, 500, False)
    assert cfg.train_cfg.max_epochs == steps.end == 12 and steps.milestones == [8, 11] and steps.gamma == 0.1
    decoder = cfg.model.decoder
    assert decoder.num_stages == 6 and decoder.num_classes == 80
    assert cfg.model.query_generator.num_queries == cfg.model.test_cfg.max_per_img == 100
    assert cfg.model.backbone.frozen_stages == 1 and cfg.model.backbone.norm_eval


def test_ten_fused_steps_are_those_of_the_plain_optimizer():
    settings = dict(load_config(COCO[0]).optim_wrapper.optimizer, lr=2.5e-3)
    weights = [nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2)]
    fused, plain = (
        OPTIMIZERS.build(dict(settings, params=[weight], fused=fused))
        for weight, fused in zip(weights, (settings["fused"], False), strict=True)
    )
    for step in range(10):
        for weight, optimizer in zip(weights, (fused, plain), strict=True):
            weight.grad = (weight * (step + 1)).sin().detach() * 10.0 ** (step % 3 - 3)
            optimizer.step()
    assert fused.defaults["fused"] and (weights[0] - weights[1]).abs().max() < 1e-6
    assert (weights[0] - torch.linspace(-1, 1, 1000)).abs().max() > 1e-3


def test_lors_settings_are_the_papers():
    plain, lors = (load_config(name).model.decoder for name in COCO)
    assert (plain.stage.num_groups, plain.stage.in_points, plain.stage.out_points) == (4, 32, 128)
    assert (lors.stage.num_groups, lors.stage.in_points, lors.stage.out_points) == (2, 64, 128)
    assert lors.lors.adaptive == dict(rank=16, groups=[1, 1, 2, 2, 3, 3])
    assert lors.lors.static == dict(rank=8, groups=1)


def test_3x_base_files():
    schedule = Config.fromfile(ROOT / "configs/_base_/schedules/adamixer_3x.py")
    assert schedule.train_cfg.max_epochs == schedule.param_scheduler[1].end == 36
    assert schedule.param_scheduler[1].milestones == [24, 33]
    data = Config.fromfile(ROOT / "configs/_base_/datasets/coco_crop-ms-480-800.py")
    steps = [build_from_cfg(step, TRANSFORMS) for step in data.train_dataloader.dataset.pipeline]
    resize = steps[3].transforms[0].transforms[0]
    assert resize.scales[0] == (480, 1333) and resize.scales[-1] == (800, 1333) and len(resize.scales) == 11


def test_the_digits_pair_differs_by_lors_alone():
    plain, lors = load_config(PLAIN_DIGITS), load_config(LORS_DIGITS)
    assert lors.model.decoder.pop("lors") is not None
    assert plain.to_dict() == lors.to_dict()
