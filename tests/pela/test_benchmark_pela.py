"""The benchmark runs, compares equals, and refuses in one line what it cannot measure. Its times are not tested."""

import json
import sys

import pytest
import timm
import torch
from conftest import load_tool
from torch import nn

from mmdet_lors.analysis.training_memory import TrainingMemory, training_memory
from mmdet_lors.engine.launch import run
from mmdet_lors.pela import compress

TOOL = "analysis_tools/benchmark_pela.py"


def test_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    arguments = ["--model", "test_vit", "--batch", "1", "--repeats", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", [TOOL, *arguments])
    load_tool(TOOL).main()
    figures = json.loads(out.read_text())
    before, after = figures["parameters"]
    assert after < before and f"{before:,} -> {after:,} parameters" in capsys.readouterr().out
    assert all(figures[key][side] > 0 for key in ("linears", "whole") for side in ("original", "compressed"))
    error = {name: way["error"] for name, way in figures["factorisation"].items()}
    assert error["exact"] == pytest.approx(error["torch.linalg.svd"], rel=1e-4)
    assert error["exact"] <= error["torch.svd_lowrank"] * (1 + 1e-6) and error["exact"] > 0.1


def test_a_training_step(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    arguments = ["--training", "--model", "test_vit", "--batch", "2", "--repeats", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", [TOOL, *arguments])
    load_tool(TOOL).main()
    figures = json.loads(out.read_text())
    whole = timm.create_model("test_vit")
    parameters = [sum(p.numel() for p in model.parameters()) for model in (whole, compress(whole, 2)[0])]
    # float32 weights, gradients and two moments
    assert list(figures["weights"].values()) == [16 * n for n in parameters]
    before, after = (figures["weights"][name] + figures["activations"][name] for name in ("original", "compressed"))
    larger = figures["largest_batch"]
    per_image = figures["activations"]["compressed"] / 2
    assert figures["weights"]["compressed"] + larger * per_image <= before
    assert f"is enough for batch {larger}" in " ".join(capsys.readouterr().out.split()) and before != after


def test_memory_of_a_step_is_what_autograd_keeps():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    optimizer, x = torch.optim.AdamW(model.parameters()), torch.randn(3, 10)
    memory = training_memory(model, optimizer, lambda: model(x).square().sum())
    # The input; what leaves ReLU, which it and the second Linear both keep; what is squared.
    assert memory == (16 * (220 + 105), 4 * 3 * (10 + 20 + 5))
    smaller = TrainingMemory(100, 50)
    assert smaller.largest_batch(10, TrainingMemory(120, 55)) == 15  # 100 + 15 * 5 = 175 = 120 + 55


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "error: --repeats must be 1 or more, got 0"),
        (["--model", "test_vit", "--ratio", "1000"], r"error: ratio 1000.0 leaves blocks.0.attn.qkv"),
        (["--model", "test_vitt"], "error: network.model_name 'test_vitt' is not a model of timm"),
        (["--model", "test_vit", "--checkpoint", "nowhere.pth"], "error: checkpoint nowhere.pth does not exist"),
    ],
)
def test_refuses(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", [TOOL, *arguments])
    with pytest.raises(SystemExit, match=message):
        run(load_tool(TOOL).main)
