"""What a real run of mmengine logs is what is previewed."""

import importlib.util
import json
import math

import pytest
import torch
from conftest import LORS_DIGITS, is_picture, load_config, load_tool, refused
from mmdet.registry import VISUALIZERS
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from mmdet_lors.engine import launch
from mmdet_lors.errors import UserError

PREVIEW = "analysis_tools/preview_schedule.py"
VIT = "configs/classification/vit-lors_digits.py"
COCO = "configs/lors/adamixer-lors_r50_100-queries_1x_coco.py"


class Line(BaseModel):
    """y = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(1, 1)

    def forward(self, *x, mode):
        return dict(loss=self.w(torch.stack(x)).square().mean())


SCHEDULE = dict(
    train_cfg=dict(by_epoch=True, max_epochs=3),
    optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.8)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=3),
        dict(type="CosineAnnealingLR", eta_min=0.01, convert_to_iter_based=True),
        dict(type="MultiStepLR", milestones=[2], gamma=0.5),
        dict(type="LinearMomentum", start_factor=0.5, by_epoch=False, end=4),
    ],
)


def test_preview_is_what_a_run_logs(tmp_path):
    """Four iterations an epoch, every one logged."""
    Runner(
        model=Line(),
        work_dir=str(tmp_path),
        train_dataloader=dict(batch_size=2, sampler=dict(type="DefaultSampler"), dataset=[torch.ones(1)] * 7),
        default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
        log_level="ERROR",
        default_scope="mmdet",
        experiment_name=tmp_path.name,
        **SCHEDULE,
    ).train()
    (log,) = tmp_path.glob("*/vis_data/scalars.json")
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    schedule = load_tool(PREVIEW).preview(Config(SCHEDULE), 4)
    assert [line["step"] for line in logged] == list(range(1, 13))
    assert [line["lr"] for line in logged] == pytest.approx(schedule.lr)
    assert schedule.lr[0] == pytest.approx(0.01) and schedule.lr[8] < 0.5 * schedule.lr[7]
    assert schedule.momentum[:5] == pytest.approx([0.4, 0.8 * (0.5 + 0.5 / 3), 0.8 * (0.5 + 1 / 3), 0.8, 0.8])
    assert schedule.turns == [0, 3, 4, 8, 12]


def test_schedule_at_known_iterations():
    preview = load_tool(PREVIEW).preview
    digits = preview(load_config(LORS_DIGITS), 100)
    assert len(digits.lr) == 1800 and digits.lr[0] == pytest.approx(5e-6)
    for iteration in (100, 900, 1799):
        cosine = 5e-4 * (1 + math.cos(math.pi * iteration / 1800)) / 2
        assert digits.lr[iteration] == pytest.approx(cosine, rel=1e-4)
    coco = preview(load_config(COCO), 100)
    assert len(coco.lr) == 1200 and set(coco.momentum) == {0.9}
    expected = {0: 2.5e-8, 500: 2.5e-5, 799: 2.5e-5, 800: 2.5e-6, 1099: 2.5e-6, 1100: 2.5e-7, 1199: 2.5e-7}
    assert {i: coco.lr[i] for i in expected} == pytest.approx(expected)
    assert coco.turns == [0, 500, 800, 1100, 1200]
    assert preview(load_config(COCO), 100, lr_scale=0.25).lr[500] == pytest.approx(2.5e-5 / 4)


def test_schedule_by_iterations_needs_no_epoch():
    preview = load_tool(PREVIEW).preview
    cfg = Config(dict(SCHEDULE, train_cfg=dict(by_epoch=False, max_iters=10)))
    cfg.param_scheduler = dict(type="MultiStepLR", by_epoch=False, milestones=[6], gamma=0.1)
    schedule = preview(cfg, None)
    assert schedule.lr == pytest.approx([0.1] * 6 + [0.01] * 4) and schedule.iterations_per_epoch is None
    with pytest.raises(UserError, match="is by epochs; give --iterations-per-epoch"):
        preview(Config(SCHEDULE), None)


def test_epoch_length_is_the_data_sets(tiny_digits):
    length = load_tool(PREVIEW).iterations_per_epoch
    cfg = load_config(LORS_DIGITS)
    cfg.train_dataloader.dataset.data_root = str(tiny_digits)
    cfg.train_dataloader.batch_size = 5
    assert [length(cfg, gpus) for gpus in (1, 3, 8)] == [7, 3, 1]
    cfg.train_dataloader.drop_last = True
    assert length(cfg, 3) == 2
    cfg.train_dataloader.dataset.data_root = "none"
    with pytest.raises(UserError, match="data folder none does not exist.*or give --iterations-per-epoch"):
        length(cfg, 1)


def test_schedule_draws(tmp_path, call_tool, capsys):
    arguments = ("--iterations-per-epoch", 250, "--out", tmp_path / "out.png", "--auto-scale-lr", "--gpus", 2)
    call_tool(PREVIEW, LORS_DIGITS, *arguments, "--at", 0, 100)
    assert is_picture(tmp_path / "out.png")
    printed = capsys.readouterr().out
    assert "1e-05" in printed and "0.000998782" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.py",), "config none.py does not exist"),
        ((LORS_DIGITS, "--iterations-per-epoch", "0"), "--iterations-per-epoch 0: must be 1 or more"),
        ((LORS_DIGITS, "--gpus", "0"), "--gpus 0: must be 1 or more"),
        ((LORS_DIGITS, "--iterations-per-epoch", "2", "--at", "36"), "--at 36: iterations are 0 to 35"),
        (("configs/_base_/default_runtime.py",), "has no optim_wrapper: it trains nothing"),
        ((LORS_DIGITS, "--out", "x"), "--out x: must end with .png"),
    ],
)
def test_schedule_refuses(arguments, message, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    assert message in refused(PREVIEW, list(arguments), monkeypatch, capsys)


def test_a_scheduler_that_cannot_be_built_is_one_line():
    cfg = Config(dict(SCHEDULE, param_scheduler=[dict(type="MultiStepLR", milestone=[2])]))
    with pytest.raises(UserError, match="cannot be built: .*milestone"):
        load_tool(PREVIEW).preview(cfg, 4)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.parametrize("config", [LORS_DIGITS, VIT])
def test_tensorboard_by_an_option(config, tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    options = {"visualizer.vis_backends.0.type": "TensorboardVisBackend"}
    cfg = launch.load_config(config, options)
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, save_dir=str(tmp_path), name=f"tensorboard {config}"))
    visualizer.add_scalars(dict(loss=1.5, lr=0.1), step=7)
    visualizer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "vis_data").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 1.5)]
