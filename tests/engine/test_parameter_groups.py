"""Parameters with equal settings share a group of the optimizer, and learn as they did."""

import shutil

import torch
from conftest import LORS_DIGITS, load_config
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from runs import Run, checkpoint, same_training, write_config


def test_merged_groups_change_no_weight():
    cfg, trained = load_config(LORS_DIGITS), []
    cfg.optim_wrapper.paramwise_cfg = dict(bias_decay_mult=0.0, custom_keys=dict(backbone=dict(lr_mult=6.0)))
    for constructor in ("DefaultOptimWrapperConstructor", "MergingOptimWrapperConstructor"):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        wrapper = dict(cfg.optim_wrapper, constructor=constructor)
        del wrapper["clip_grad"]  # whose norm is a sum in the order of the groups
        optimizer = build_optim_wrapper(model, wrapper).optimizer
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = (parameter.detach() + step).sin()
            optimizer.step()
        trained.append((model.state_dict(), optimizer.param_groups))
    (weights, groups), (others, merged) = trained
    settings = sorted((group["lr"], group["weight_decay"], len(group["params"])) for group in merged)
    assert [found[:2] for found in settings] == [(5e-4, 0.0), (5e-4, 1e-4), (5e-4 * 6, 1e-4)]
    assert sum(found[2] for found in settings) == len(groups) > 100
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_run_that_began_with_a_group_of_each_parameter_is_resumed(tiny_digits, tmp_path):
    config = write_config("classification", tmp_path, tiny_digits)
    one_each = ["--cfg-options", "optim_wrapper.constructor=DefaultOptimWrapperConstructor"]
    works = {name: Run(config, tmp_path / name, *options).done().work for name, options in
             {"few": [], "many": one_each}.items()}  # fmt: skip
    groups = {name: checkpoint(work / "iter_6.pth")["optimizer"]["param_groups"] for name, work in works.items()}
    assert len(groups["few"]) < 5 and len(groups["many"]) > 30
    (tmp_path / "resumed").mkdir()
    shutil.copy(works["many"] / "iter_4.pth", tmp_path / "resumed")
    resumed = Run(config, tmp_path / "resumed", "--resume").done().work
    assert same_training(works["many"] / "iter_6.pth", resumed / "iter_6.pth") == []
