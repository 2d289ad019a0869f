"""The command-line tools on a tiny data set: train, resume, evaluate, two processes, and what they refuse."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, refused, run


def options(data: Path) -> list[str]:
    """--cfg-options for a run of seconds on this data set."""
    settings = [f"val_evaluator.ann_file={data}/annotations/val.json", "train_cfg.val_interval=1"]
    settings += [f"test_evaluator.ann_file={data}/annotations/val.json", "train_dataloader.batch_size=8"]
    for split in ("train", "val", "test"):
        settings.append(f"{split}_dataloader.dataset.data_root={data}")
        settings += [f"{split}_dataloader.num_workers=0", f"{split}_dataloader.persistent_workers=False"]
    return ["--cfg-options", *settings]


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory) -> Path:
    """The work folder of one epoch in two processes through dist_train.sh."""
    work = tmp_path_factory.mktemp("work")
    settings = options(tiny_digits)
    done = run(
        "bash",
        "tools/dist_train.sh",
        LORS_DIGITS,
        "2",
        "--work-dir",
        str(work),
        *settings,
        "train_cfg.max_epochs=1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return work


def test_two_processes_train_and_write_a_checkpoint(trained):
    assert (trained / "epoch_1.pth").is_file()
    assert (trained / "last_checkpoint").read_text().endswith("epoch_1.pth")
    log = next(trained.glob("*/*.log")).read_text()
    assert "launcher = 'pytorch'" in log and "coco/bbox_mAP" in log


def test_resume_goes_on_from_the_newest_checkpoint(trained, tiny_digits):
    done = run(
        sys.executable,
        "tools/train.py",
        LORS_DIGITS,
        "--work-dir",
        str(trained),
        "--resume",
        *options(tiny_digits),
        "train_cfg.max_epochs=2",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    output = done.stdout + done.stderr
    assert "resumed epoch: 1, iter: 2" in output
    assert (trained / "epoch_2.pth").is_file()


def test_dist_test_prints_and_writes_the_metrics(trained, tiny_digits, tmp_path):
    done = run(
        "bash",
        "tools/dist_test.sh",
        LORS_DIGITS,
        str(trained / "epoch_1.pth"),
        "2",
        "--work-dir",
        str(tmp_path),
        "--metrics",
        str(tmp_path / "metrics.json"),
        "--out",
        str(tmp_path / "raw.pkl"),
        "--show-dir",
        "pictures",
        "--show-interval",
        "4",
        *options(tiny_digits),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Average Precision" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 <= metrics["coco/bbox_mAP"] <= metrics["coco/bbox_mAP_50"] <= 1
    # The first process draws, and every 4th of its 4 images.
    assert len(list(tmp_path.glob("*/pictures/*.png"))) == 1
    assert (tmp_path / "raw.pkl").is_file()


def test_test_time_augmentation(trained, tiny_digits, tmp_path):
    done = run(
        sys.executable,
        "tools/test.py",
        LORS_DIGITS,
        str(trained / "epoch_1.pth"),
        "--tta",
        "--work-dir",
        str(tmp_path),
        *options(tiny_digits),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Average Precision" in done.stdout


def test_train_refuses_a_missing_config(work, monkeypatch, capsys):
    assert "nothing.py does not exist" in refused("train.py", ["nothing.py", *work], monkeypatch, capsys)


def test_train_refuses_a_broken_config(work, tmp_path, monkeypatch, capsys):
    config = tmp_path / "broken.py"
    config.write_text("model = dict(")
    assert "broken.py cannot be read" in refused("train.py", [str(config), *work], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.decoder.num_classes=7", "model.decoder.num_classes is 7, but train_dataloader's data set has 10"),
        ("model.decoder.lors.adaptive.groups=[1,1]", "lors.adaptive.groups has 2 entries for 3 stages"),
        ("model.decoder.lors.static.rank=0", "lors.static.rank must be 1 or more, got 0"),
        ("model.decoder.lors.static.size=3", "lors.static.size is unknown"),
        ("model.decoder.stage.num_groups=5", "feat_channels 64 is not divisible by num_groups 5"),
        ("model.decoder.featmap_strides=[4,8]", "featmap_strides has 2 entries for 3 neck levels"),
        ("model.decoder.num_layers=3", "model.decoder.num_layers: AdaMixerDecoder has no such field"),
        ("model.neck.type=ChannelMaping", "ChannelMaping is not in the mmdet::model registry"),
        ("load_from=none.pth", "checkpoint none.pth does not exist"),
    ],
)
def test_train_refuses_a_setting(setting, message, tiny_digits, work, monkeypatch, capsys):
    arguments = [str(ROOT / LORS_DIGITS), *work, *options(tiny_digits), setting]
    assert message in refused("train.py", arguments, monkeypatch, capsys)


def test_resume_refuses_a_checkpoint_that_is_cut_short(trained, tiny_digits, work, tmp_path, monkeypatch, capsys):
    cut = tmp_path / "cut.pth"
    cut.write_bytes((trained / "epoch_1.pth").read_bytes()[:5000])
    arguments = [str(ROOT / LORS_DIGITS), "--resume", str(cut), *work, *options(tiny_digits)]
    assert "it is cut short" in refused("train.py", arguments, monkeypatch, capsys)


def test_train_refuses_float16_without_a_gpu(work, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused("train.py", [str(ROOT / LORS_DIGITS), "--amp", "float16", *work], monkeypatch, capsys)
    assert "--amp float16 needs a CUDA GPU; device cpu trains with --amp bfloat16" in message


def test_test_refuses_a_checkpoint(trained, tiny_digits, work, tmp_path, monkeypatch, capsys):
    cut = tmp_path / "cut.pth"
    cut.write_bytes((trained / "epoch_1.pth").read_bytes()[:5000])
    for checkpoint, message in ((cut, "it is cut short"), (tmp_path / "none.pth", "does not exist")):
        arguments = [str(ROOT / LORS_DIGITS), str(checkpoint), *work, *options(tiny_digits)]
        assert message in refused("test.py", arguments, monkeypatch, capsys)


def test_test_refuses_a_checkpoint_of_another_architecture(trained, tiny_digits, work, monkeypatch, capsys):
    arguments = [str(ROOT / PLAIN_DIGITS), str(trained / "epoch_1.pth"), *work]
    message = refused("test.py", [*arguments, *options(tiny_digits)], monkeypatch, capsys)
    assert re.search(r"12 missing \(decoder.stages.0.mixing.parameter_generator.weight, .*\d+ unexpected", message)


@pytest.mark.parametrize(
    "script", ["dist_train.sh", "dist_test.sh", "dist_infer.sh", "slurm_train.sh", "slurm_test.sh"]
)
def test_launch_scripts_explain_themselves(script):
    done = run("bash", f"tools/{script}", "--help")
    assert done.returncode == 0 and "CONFIG" in done.stdout
    assert run("bash", f"tools/{script}").returncode == 2


def test_dist_train_refuses_a_number_of_gpus():
    done = run("bash", "tools/dist_train.sh", LORS_DIGITS, "many")
    assert done.returncode == 2 and "GPUS must be a positive number, got 'many'" in done.stderr


def test_dist_train_names_a_port_in_use(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr("conftest.free_port", lambda: port)
        done = run("bash", "tools/dist_train.sh", LORS_DIGITS, "1", "--work-dir", str(tmp_path / "w"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: port {port} is in use, perhaps by another run; set PORT to a free one" in done.stderr
    assert not (tmp_path / "w").exists()


def test_dist_train_ends_with_one_line(tmp_path):
    done = run("bash", "tools/dist_train.sh", "nothing.py", "1", "--work-dir", str(tmp_path / "w"))
    assert done.returncode != 0
    assert "error: config nothing.py does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()
