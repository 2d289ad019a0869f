"""The benchmark: its yardstick computes what the decoder computes, and its tables come out."""

import json
import math
import sys

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, data_samples, load_config, load_tool, random_lors, run

from mmdet_lors.errors import UserError

SIZE = (64, 96)


@pytest.fixture
def naive():
    """The benchmark's naive decoder, importable as it is for the script."""
    load_tool("analysis_tools/benchmark.py")
    return sys.modules["decoder_benchmark.naive"].NaiveDecoder


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS])
def test_naive_decoder_has_the_same_losses_and_gradients(name, naive):
    """Offsets that start at zero put points exactly between two cells, where the gradient may be either cell's."""
    cfg = load_config(name).model
    ours = random_lors(cfg).double().train()
    for parameter in ours.decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    cfg.decoder.type = naive
    theirs = random_lors(cfg).double().train()
    theirs.load_state_dict(ours.state_dict())
    images, samples = torch.randn(2, 3, *SIZE, dtype=torch.float64), data_samples([3, 2], SIZE, 10)
    found = []
    for model in (ours, theirs):
        losses = model.loss(images, samples)
        sum(v for k, v in losses.items() if "loss" in k).backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        found.append({**{k: v.detach() for k, v in losses.items()}, **grads})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[1].items():
        assert (found[0][key] - expected).norm() <= 1e-8 * expected.norm() + 1e-12, key


def test_tables_of_a_small_run(tmp_path, naive):
    out, raw = tmp_path / "benchmark.md", tmp_path / "benchmark.json"
    done = run(
        sys.executable, "tools/analysis_tools/benchmark.py", "--size", "64x64", "--queries", "10", "--repeats", "1",
        "--variants", "plain 2x64", "LORS, served folded", "--work", "inference", "matching",
        "--sections", "speed", "profile", "--threads", "1", "--device", "cpu", "--keep-memory", "--out", str(out),
        "--json", str(raw),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page, found = out.read_text(), json.loads(raw.read_text())
    assert "| decoder: inference | 10 queries, batch 2: s | / plain 2x64 | of the matrix rate |" in page
    assert page.count("| LORS, served folded |") == 1 and page.count("| plain 2x64 |") == 2
    assert set(found["decoder/matching/10/2"]) == {"plain 2x64", "others"}
    plain = found["profile/inference/10/2/plain 2x64"]["operations"]
    counted = 2 * sys.modules["decoder_benchmark.case"].products("plain 2x64", 10, (64, 64))
    assert sum(kind["multiply_adds"] for kind in plain) == pytest.approx(counted, rel=0.02)
    assert plain == sorted(plain, key=lambda kind: -kind["seconds"])
    assert "| plain 2x64: inference, 10 queries, batch 2 | calls | of the time | of the matrix rate |" in page


@pytest.mark.parametrize(("others", "given"), [(0.04, True), (0.06, False), (math.nan, True)])
def test_gives_no_ratio_beside_other_work(others, given, naive, monkeypatch):
    """Half the time is half the time, and two equal products are the matrix rate, on a quiet machine only."""
    tool = load_tool("analysis_tools/benchmark.py")
    seconds = {"plain 2x64": [2.0, 4.0], "LORS": [1.0, 2.0], "matrix product": [0.5, 1.0]}
    monkeypatch.setattr(tool, "speed", lambda *_, **__: (seconds, others))
    monkeypatch.setattr(tool, "products", lambda *_: 4096**3)
    arguments = ["--variants", "plain 2x64", "LORS", "--work", "inference", "--queries", "10", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    lines = tool.speed_section(tool.parse_args(), {})
    assert lines[2:4] == ["| plain 2x64 | 3.00 | 1.00 | 0.50 |", "| LORS | 1.50 | 0.50 | 1.00 |"] or not given
    assert lines[2:4] == ["| plain 2x64 | 3.00 |  |  |", "| LORS | 1.50 |  |  |"] or given
    told = "No ratios where other processes took more than 0.05 of a core: 0.06 at 10 queries, batch 2."
    assert (told in lines) is not given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats, --threads, --queries and --batch must be 1 or more"),
        (["--device", "cuda"], "--device cuda: there is no GPU"),
    ],
)
def test_refuses(arguments, message, naive, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    tool = load_tool("analysis_tools/benchmark.py")
    with pytest.raises(UserError, match=message):
        tool.check(tool.parse_args())
