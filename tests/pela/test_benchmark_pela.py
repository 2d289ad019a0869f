"""The benchmark runs, compares equals, and refuses in one line what it cannot measure. Its times are not tested."""

import json
import sys

import pytest
from conftest import load_tool

from mmdet_lors.engine.launch import run

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
