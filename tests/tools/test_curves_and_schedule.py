"""What a real run of mmengine logs is what is previewed and what is plotted."""

import importlib.util
import json
import math
from pathlib import Path

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

PLOT = "analysis_tools/plot_logs.py"
PREVIEW = "analysis_tools/preview_schedule.py"
VIT = "configs/classification/vit-lors_digits.py"
SWIN = "configs/lors/adamixer-lors_swin-s_300-queries_crop-ms-480-800-3x_coco.py"
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


def train(work_dir: Path, epochs: int = 3, resume: bool = False) -> Runner:
    """Four iterations an epoch, every one logged."""
    runner = Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=dict(batch_size=2, sampler=dict(type="DefaultSampler"), dataset=[torch.ones(1)] * 7),
        default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
        log_level="ERROR",
        resume=resume,
        default_scope="mmdet",
        experiment_name=f"{work_dir.name}_{epochs}_{resume}",
        **{**SCHEDULE, "train_cfg": dict(by_epoch=True, max_epochs=epochs)},
    )
    runner.train()
    return runner


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "line"
    train(folder)
    return folder


def test_preview_is_what_a_run_logs(trained_run):
    plot, preview = load_tool(PLOT), load_tool(PREVIEW)
    found = plot.curves(plot.read_run(trained_run))
    schedule = preview.preview(Config(SCHEDULE), 4)
    assert found["lr"].x == list(range(1, 13)) and found["lr"].unit == "iteration"
    assert found["lr"].y == pytest.approx(schedule.lr) and len(found["loss"].y) == 12
    assert found["lr"].y[0] == pytest.approx(0.01) and schedule.lr[8] < 0.5 * schedule.lr[7]
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


def test_parameters_by_multiplier():
    groups = load_tool(PREVIEW).parameter_groups
    full, frozen = groups(load_config(COCO))
    # As in test_model_report.py: stem and first stage of the ResNet.
    assert frozen[:2] == (0, 0) and frozen.parameters == 7 * 7 * 3 * 64 + 2 * 64 + 215_808
    assert full[:2] == (1, 1) and full.parameters + frozen.parameters == 59_866_472
    decayed, free = groups(load_config(SWIN))
    assert decayed[:2] == (1, 1) and free[:2] == (1, 0)
    assert decayed.parameters + free.parameters == 84_633_842


def test_schedule_draws(tmp_path, call_tool, capsys):
    arguments = ("--iterations-per-epoch", 250, "--out", tmp_path / "out.png", "--auto-scale-lr", "--gpus", 2)
    call_tool(PREVIEW, LORS_DIGITS, *arguments, "--at", 0, 100)
    assert is_picture(tmp_path / "out.png")
    printed = capsys.readouterr().out
    assert "1e-05" in printed and "0.000998782" in printed and "1,367,990" in printed


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


def test_resumed_run_is_one_curve(tmp_path):
    plot = load_tool(PLOT)
    train(tmp_path / "line", epochs=2)
    lines = plot.read_run(tmp_path / "line")
    assert len(lines) == 8
    # Ran on into the third epoch and was interrupted; resumed from the end of the second.
    (log,) = tmp_path.glob("line/*/vis_data/scalars.json")
    with log.open("a") as file:
        file.write(json.dumps(dict(loss=9.0, lr=9.0, epoch=3, iter=9, step=9)) + '\n{"loss": 1.')
    (log.parents[1]).rename(tmp_path / "line" / "20000101_000000")
    train(tmp_path / "line", epochs=4, resume=True)
    found = plot.curves(plot.read_run(tmp_path / "line"))
    assert found["lr"].x == list(range(1, 17)) and 9.0 not in found["loss"].y
    # A run that began anew stands alone.
    (tmp_path / "line" / "30000101_000000" / "vis_data").mkdir(parents=True)
    (tmp_path / "line" / "30000101_000000" / "vis_data" / "scalars.json").write_text(
        "".join(json.dumps(dict(loss=float(i), epoch=1, iter=i, step=i)) + "\n" for i in (1, 2, 3))
    )
    assert plot.curves(plot.read_run(tmp_path / "line"))["loss"].y == [1, 2, 3]


def test_validation_goes_by_epoch_and_is_not_smoothed():
    plot = load_tool(PLOT)
    lines = [dict(loss=4.0, time=1.0, epoch=1, iter=50, step=50), {"coco/bbox_mAP": 0.5, "time": 9.0, "step": 1}]
    lines += [dict(loss=2.0, time=1.0, epoch=2, iter=100, step=100), {"coco/bbox_mAP": 0.6, "time": 9.0, "step": 2}]
    found = plot.curves(lines)
    assert found["coco/bbox_mAP"] == ([1, 2], [0.5, 0.6], "epoch", False)
    assert found["loss"] == ([50, 100], [4.0, 2.0], "iteration", True) and found["time"].y == [1.0, 1.0]
    by_iteration = [{k: v for k, v in line.items() if k != "epoch"} for line in lines]
    assert plot.curves(by_iteration)["coco/bbox_mAP"].unit == "iteration"
    panels = plot.choose(None, dict(run=found))
    assert list(panels) == ["loss", "coco/bbox_mAP"]
    loss, metric = plot.draw(dict(run=found), panels, weight=0.5).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[4, 2], pytest.approx([4, 8 / 3])]
    assert [list(line.get_ydata()) for line in metric.lines] == [[0.5, 0.6]]
    assert plot.smooth([3.0, 5.0], 0) == [3, 5]


def test_curves_share_a_panel_by_pattern(tmp_path, call_tool, capsys):
    log = tmp_path / "scalars.json"
    entries = [dict(stage0_loss=i, stage1_loss=2 * i, lr=1 / i, epoch=1, iter=i, step=i) for i in (1, 2, 3)]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    call_tool(PLOT, log, log, "--names", "a", "b", "--keys", "stage*_loss", "lr", "--out", tmp_path / "out.png")
    assert is_picture(tmp_path / "out.png") and capsys.readouterr().out.count("│      3 │") == 6
    plot = load_tool(PLOT)
    runs = {name: plot.curves(plot.read_run(log)) for name in "ab"}
    stages, lr = plot.draw(runs, plot.choose(["stage*_loss", "lr"], runs)).axes[:2]
    assert [line.get_label() for line in stages.lines] == [f"stage{i}_loss {name}" for name in "ab" for i in (0, 1)]
    assert [len(line.get_xdata()) for line in (*stages.lines, *lr.lines)] == [3] * 6
    call_tool(PLOT, log, "--list")
    assert capsys.readouterr().out.split() == ["stage0_loss", "stage1_loss", "lr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none",), "run none does not exist"),
        (("{}",), "has no */vis_data/scalars.json: nothing was logged there"),
        (("{}/log", "--keys", "acc"), "--keys acc: no run logged it; logged: loss"),
        (("{}/log", "--smooth", "1"), "--smooth 1: must be 0 or more and below 1"),
        (("{}/log", "{}/log"), "runs of equal names"),
        (("{}/log", "--names", "a", "b"), "--names has 2 entries for 1 runs"),
        (("README.md",), "log README.md, line 1: not JSON"),
    ],
)
def test_logs_refuses(arguments, message, tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    (tmp_path / "log").write_text('{"loss": 1.0, "iter": 1, "step": 1}\n')
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert message in refused(PLOT, arguments, monkeypatch, capsys)


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
