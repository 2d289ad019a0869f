"""The benchmark: its yardstick computes what the decoder computes, and its tables come out."""

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


def test_tables_of_a_small_run(tmp_path):
    out, raw = tmp_path / "benchmark.md", tmp_path / "benchmark.json"
    done = run(
        sys.executable, "tools/analysis_tools/benchmark.py", "--size", "64x64", "--queries", "10", "--repeats", "1",
        "--variants", "plain 2x64", "LORS", "LORS, served folded", "naive LORS", "--work", "inference", "step",
        "--sections", "speed", "matching", "--threads", "1", "--device", "cpu", "--out", str(out), "--json", str(raw),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert "| decoder: inference | 10 queries, batch 2: s | / plain 2x64 | / naive LORS |" in page
    assert page.count("| LORS, served folded |") == 1 and page.count("| naive LORS |") == 2
    assert "## Matching" in page and raw.stat().st_size > 100


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
    with pytest.raises(UserError, match=message):
        load_tool("analysis_tools/benchmark.py").parse_args()
