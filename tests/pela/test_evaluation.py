"""tools/test.py and tools/train.py with PELA's configs: checkpoints before compression, and what is refused."""

import json
import pickle
import sys

import pytest
import torch
from conftest import ROOT, load_tool, refused
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils.data import default_collate

from mmdet_lors.pela import compress

PLAIN, COMPRESSED = "configs/classification/vit_digits.py", "configs/pela/pela_vit_digits.py"
DISTILLER = "configs/pela/pela-distiller_vit_digits.py"
SETTINGS = ["--cfg-options"]
for split in ("train", "val", "test"):
    SETTINGS += [f"{split}_dataloader.num_workers=0", f"{split}_dataloader.persistent_workers=False"]


@pytest.fixture(scope="module")
def plain():
    """A classifier that was not compressed."""
    torch.manual_seed(0)
    return MODELS.build(Config.fromfile(ROOT / PLAIN).model)


def test_testing_compresses_an_uncompressed_checkpoint(plain, tmp_path, monkeypatch):
    """The scores of the whole test split are those of the model that compress() makes of the checkpoint."""
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / "plain.pth")
    arguments = ["--out", "scores.pkl", "--metrics", "metrics.json", "--work-dir", "work", *SETTINGS]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test.py", str(ROOT / COMPRESSED), "plain.pth", *arguments])
    load_tool("test.py").main()
    assert "accuracy/top1" in json.loads((tmp_path / "metrics.json").read_text())
    found = [sample["scores"] for sample in pickle.loads((tmp_path / "scores.pkl").read_bytes())]
    cfg = Config.fromfile(ROOT / COMPRESSED)
    expected, _ = compress(plain, cfg.model.ratio, cfg.model.omit)
    assert torch.allclose(torch.stack(found[:20]), scores(expected, cfg, 20), atol=1e-5)
    assert not torch.allclose(torch.stack(found[:20]), scores(plain, cfg, 20), atol=1e-4)


@torch.no_grad()
def scores(model: nn.Module, cfg: Config, number: int) -> Tensor:
    """Of the first images of the test split."""
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    batch = default_collate([dataset[i] for i in range(number)])
    return torch.stack([sample["scores"] for sample in model.eval().test_step(batch)])


def test_testing_refuses_weights_of_another_width(plain, tmp_path, work, monkeypatch, capsys):
    weights = dict(plain.state_dict())
    weights["network.blocks.0.mlp.fc1.weight"] = torch.zeros(100, 96)
    torch.save(dict(state_dict=weights), tmp_path / "other.pth")
    arguments = [str(ROOT / COMPRESSED), str(tmp_path / "other.pth"), *work, *SETTINGS]
    message = refused("test.py", arguments, monkeypatch, capsys)
    shape = "1 of another shape (network.blocks.0.mlp.fc1.weight (100, 96) instead of (384, 96))"
    assert message.endswith(f"is of another architecture: keys {shape}")


def test_training_refuses_a_teacher_without_weights(tmp_path, work, monkeypatch, capsys):
    missing = tmp_path / "teacher.pth"
    arguments = [str(ROOT / DISTILLER), *work, *SETTINGS, f"model.teacher_checkpoint={missing}"]
    message = refused("train.py", arguments, monkeypatch, capsys)
    assert message == f"error: model.teacher_checkpoint: file {missing} does not exist"
