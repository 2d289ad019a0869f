"""The line of each interval: what it says of every kind of model, that it fits a screen, and that nothing is lost."""

import re
from types import SimpleNamespace

import pytest
from conftest import LORS_DIGITS, ROOT
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import LOG_PROCESSORS
from mmengine.runner import LogProcessor

from mmdet_lors.engine.log_line import ShortLogProcessor
from mmdet_lors.engine.new_style import classic

SCREEN = 120
TIMES = dict(time=0.5, data_time=0.02)


def logged(scalars: dict, iteration: int, epoch: int = 11, length: int = 7330, eta: float = 93784.9, **fields):
    """What is shown and recorded of these values, at this iteration of this epoch, both from 0."""
    hub = MessageHub(f"run {len(scalars)}")
    for name, value in scalars.items():
        hub.update_scalar(f"train/{name}", value)
    hub.update_info("eta", eta)
    total = epoch * length + iteration
    runner = SimpleNamespace(
        message_hub=hub, epoch=epoch, iter=total, max_epochs=36, max_iters=36 * length, _train_loop=1
    )
    runner.train_loop = SimpleNamespace(dataloader=range(length))
    runner.train_dataloader, runner.model = range(length), None
    return ShortLogProcessor(**fields).get_log_after_iter(runner, iteration, "train")


def stages(number: int, name: str = "stage{}_", **more: float) -> dict:
    """The losses of so many stages, as the decoder names them."""
    found = {}
    for i in range(number):
        for j, loss in enumerate(["loss_cls", "pos_acc", "loss_bbox", "loss_iou"]):
            found[name.format(i) + loss] = 1.23 * (i + 1) / number + j
    return dict(
        lr=2.5e-5, **TIMES, grad_norm=51.6, loss=sum(v for k, v in found.items() if "loss" in k), **found, **more
    )


def printed(line: str, capsys) -> str:
    """The line as mmengine's logger prints it."""
    MMLogger("run", logger_name="mmengine", log_level="INFO").info(line)
    return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out.rstrip("\n"))


@pytest.mark.parametrize("number", [3, 6])
@pytest.mark.parametrize("by_epoch", [True, False])
def test_a_line_of_this_projects_detectors_fits_a_screen(number, by_epoch, capsys, monkeypatch):
    monkeypatch.setattr("mmengine.runner.log_processor.is_cuda_available", lambda: True)
    monkeypatch.setattr(LogProcessor, "_get_max_memory", lambda *_: 12345)
    values = stages(number)
    tag, line = logged(values, 7329, by_epoch=by_epoch)
    where = "[12][7330/7330]" if by_epoch else "[ 87960/263880]"
    losses = f"loss {values['loss']:.2f} s{number - 1} cls 1.23 bbox 3.23 iou 4.23"
    assert line == f"{where} {losses} lr 2.5e-05 eta 26h03m 13GB"
    whole = printed(line, capsys)
    assert whole.endswith(f" - mmengine - INFO - {line}") and len(whole) <= SCREEN
    assert {name: tag[name] for name in values} == values and tag["memory"] == 12345


def test_without_a_gpu_memory_is_the_processs():
    words = logged(stages(3), 49, epoch=0, length=250, eta=61)[1].split()
    assert words[:2] == ["[1][", "50/250]"] and words[-3:-1] == ["eta", "1m01s"]
    assert re.fullmatch(r"\d\.\dGB|\d{2,}GB", words[-1]) and 0.1 < float(words[-1][:-2]) < 1000


OTHERS = {
    "classifier": (dict(loss=2.3), "loss 2.30"),
    "distiller": (dict(loss=2.31, loss_cls=2.3, loss_feature=0.00512), "loss 2.31 cls 2.30 feature 0.0051"),
    "Mask R-CNN": (
        dict(loss=1.5, loss_rpn_cls=0.04, loss_cls=0.5, acc=98.5, loss_mask=0.7),
        "loss 1.50 rpn_cls 0.04 cls 0.50 acc 98.50 mask 0.70",
    ),
    "Cascade": (
        {"loss": 3.0, "loss_rpn_cls": 0.4, "s0.loss_cls": 0.5, "s0.acc": 90.0, "s2.loss_cls": 0.25, "s2.acc": 95.0},
        "loss 3.00 rpn_cls 0.40 s2 cls 0.25",
    ),
    "DINO": (
        {"loss": 9.0, "loss_cls": 0.5, "loss_iou": 0.75, "d0.loss_cls": 1.0, "d4.loss_cls": 1.0, "dn_loss_cls": 0.1}
        | {"d0.dn_loss_cls": 0.2},
        "loss 9.00 cls 0.50 iou 0.75 dn_cls 0.10",
    ),
    "UPerNet": (
        {"decode.loss_ce": 1.5, "decode.acc_seg": 50.0, "loss": 2.0},
        "loss 2.00 decode.ce 1.50 decode.acc_seg 50.00",
    ),
    "two parts with stages": (
        {"a.stage0_loss_x": 1.0, "a.stage1_loss_x": 2.0, "b.stage0_loss_x": 3.0, "loss": 6.0},
        "loss 6.00 a.s1 x 2.00 b.s0 x 3.00",
    ),
    "twelve stages": ({f"stage{i}_loss_x": float(i) for i in range(12)} | dict(loss=66.0), "loss 66.00 s11 x 11.00"),
    "what is no loss": (
        dict(loss=float("nan"), pairs=3, negative=-0.5, zero=0.0),
        "loss nan pairs 3 negative -0.50 zero 0.00",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("log_with_hierarchy", [False, True])
def test_other_models_show_what_they_have(kind, log_with_hierarchy):
    values, expected = OTHERS[kind]
    tag, line = logged(dict(values, lr=1e-4), 0, log_with_hierarchy=log_with_hierarchy)
    assert line.removeprefix("[12][   1/7330] ").split(" lr ")[0] == expected
    assert {f"train/{name}" if log_with_hierarchy else name for name in values} <= tag.keys()


def test_several_learning_rates_and_no_timer():
    _, line = logged({"loss": 1.0, "a.lr": 1e-4, "b.lr": 0.02}, 0)
    assert "loss 1.00 a.lr 0.0001 b.lr 0.02 eta" in line


def test_statistics_are_those_of_the_config():
    extra = [dict(data_src="loss", log_name="loss_max", method_name="max")]
    assert "loss 1.00 max 1.00 eta" in logged(dict(loss=1.0), 0, custom_cfg=extra)[1]


def test_configs_have_it_and_a_config_that_builds_on_them_may_have_another(tmp_path):
    own = f"_base_ = {str(ROOT / LORS_DIGITS)!r}\nlog_processor = dict({{}})\n"
    for settings, kind in (("window_size=7", ShortLogProcessor), ("type='LogProcessor', num_digits=3", LogProcessor)):
        path = tmp_path / f"{kind.__name__}.py"
        path.write_text(own.format(settings))
        assert type(LOG_PROCESSORS.build(Config.fromfile(path).log_processor)) is kind
    for name in ("classification/vit_digits.py", "lors/adamixer_lors_r18_digits_new_style.py"):
        cfg = classic(Config.fromfile(ROOT / "configs" / name))
        assert type(LOG_PROCESSORS.build(cfg.log_processor)) is ShortLogProcessor
