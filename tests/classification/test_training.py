"""Training, resuming and testing a classifier through the same tools as a detector, and what they refuse."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_tool, refused, run

PLAIN, LORS = "configs/classification/vit_digits.py", "configs/classification/vit-lors_digits.py"
CIFAR = "configs/classification/deit-tiny_cifar100.py"
SETTINGS = ["--cfg-options", "train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1"]
for split in ("train", "val", "test"):
    SETTINGS += [f"{split}_dataloader.num_workers=0", f"{split}_dataloader.persistent_workers=False"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The work folder of one epoch in two processes through dist_train.sh."""
    folder = tmp_path_factory.mktemp("work")
    arguments = [LORS, "2", "--work-dir", str(folder), *SETTINGS, "train_cfg.max_epochs=1"]
    done = run("bash", "tools/dist_train.sh", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_two_processes_train_and_save_the_shared_weight_once(trained):
    weights = torch.load(trained / "epoch_1.pth", weights_only=True)["state_dict"]
    assert [name for name in weights if name.endswith("qkv.weight_lorst.shared")] == [
        "network.blocks.0.attn.qkv.weight_lorst.shared"
    ]
    log = next(trained.glob("*/*.log")).read_text()
    assert "launcher = 'pytorch'" in log and "accuracy/top1" in log


def test_resume_goes_on_from_the_newest_checkpoint(trained):
    arguments = [LORS, "--work-dir", str(trained), "--resume", *SETTINGS, "train_cfg.max_epochs=2"]
    done = run(sys.executable, "tools/train.py", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed epoch: 1, iter: 11" in done.stdout + done.stderr
    assert (trained / "epoch_2.pth").is_file()


def test_mixed_precision(tmp_path):
    arguments = [LORS, "--amp", "--work-dir", str(tmp_path), *SETTINGS, "train_cfg.max_epochs=1"]
    done = run(sys.executable, "tools/train.py", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    weights = torch.load(tmp_path / "epoch_1.pth", weights_only=True)["state_dict"]
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights.values())


def test_testing_writes_metrics_and_scores(trained, tmp_path):
    outputs = ["--metrics", str(tmp_path / "metrics.json"), "--out", str(tmp_path / "scores.pkl")]
    arguments = [LORS, str(trained / "epoch_1.pth"), "2", "--work-dir", str(tmp_path), *outputs, *SETTINGS]
    done = run("bash", "tools/dist_test.sh", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    scores = pickle.loads((tmp_path / "scores.pkl").read_bytes())
    assert len(scores) == 355
    right = sum(sample["scores"].argmax().item() == sample["label"] for sample in scores)
    assert metrics["accuracy/top1"] == pytest.approx(100 * right / 355)
    assert metrics["accuracy/top1"] <= metrics["accuracy/top5"] <= 100


@pytest.mark.parametrize(
    ("config", "setting", "message"),
    [
        (
            CIFAR,
            "train_dataloader.dataset.data_root=nowhere",
            "data folder nowhere/cifar-100-python does not exist; get",
        ),
        (PLAIN, "model.num_classes=7", "model.num_classes is 7, but train_dataloader's data set has 10 classes"),
        (LORS, "model.model.num_classes=7", "model.model.num_classes is 7, but train_dataloader's data set has 10"),
        (PLAIN, "model.network.model_name=vit_tinny", "network.model_name 'vit_tinny' is not a model of timm"),
        (PLAIN, "model.network.deptth=3", "unexpected keyword argument 'deptth'"),
        (PLAIN, "model.mixup.alpha=1", "--cfg-options does not fit config"),
        (PLAIN, "model.label_smoothing=2", "label_smoothing must be in [0, 1), got 2"),
        (LORS, "model.stacks.0.layers=network.block", "stacks[0].layers 'network.block': VisionTransformer has no"),
        (PLAIN, "train_dataloader.dataset.split=test", "split must be 'train' or 'val', got 'test'"),
    ],
)
def test_train_refuses_a_setting(config, setting, message, work, monkeypatch, capsys):
    assert message in refused("train.py", [str(ROOT / config), *work, *SETTINGS, setting], monkeypatch, capsys)


def test_test_refuses_what_is_made_for_boxes(trained, work, monkeypatch, capsys):
    arguments = [str(ROOT / LORS), str(trained / "epoch_1.pth"), *work]
    assert "--tta flips images and merges boxes" in refused("test.py", [*arguments, "--tta"], monkeypatch, capsys)
    message = refused("test.py", [*arguments, "--show-dir", "x"], monkeypatch, capsys)
    assert "--show and --show-dir draw boxes" in message


def test_test_refuses_the_plain_models_checkpoint(trained, work, monkeypatch, capsys):
    arguments = [str(ROOT / PLAIN), str(trained / "epoch_1.pth"), *work]
    assert "is of another architecture" in refused("test.py", arguments, monkeypatch, capsys)


def test_study_page():
    study = load_tool("studies/classification_study.py")
    runs = {"plain": [98.0, 96.0], "LORST": [97.0, 98.5], "LORSA per token": [95.0, 96.0]}
    results = {name: [dict(top1=t, top5=100.0, seconds=60) for t in found] for name, found in runs.items()}
    page = study.page(results, jobs=2)
    assert "| 671,040 | 97.00 | 98.00, 96.00 | 100.00 |" in page
    assert "minus the plain model's, in points: LORST +0.75, LORSA per token -1.50. Seeds of one variant" in page
    assert "differ by up to 2.00 points" in page
