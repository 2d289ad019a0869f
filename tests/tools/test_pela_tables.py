"""The PELA paper's tables: counts by hand and by the paper, and the committed page."""

import dataclasses
import importlib.util

import pytest
import torch
from conftest import load_tool
from torch import nn

from mmdet_lors.analysis import pela_tables
from mmdet_lors.analysis.albef import ALBEF
from mmdet_lors.analysis.pela_tables import Count
from mmdet_lors.errors import UserError

MISSING = pela_tables.missing_packages()


@pytest.fixture(scope="module")
def counts(root):
    return pela_tables.Counts(root)


def table(number: int) -> pela_tables.Table:
    return next(t for t in pela_tables.TABLES if t.number == number)


def numbers() -> dict[str, int]:
    return {key: i for i, key in enumerate(pela_tables.REASONS, start=1)}


def test_layers_and_attention_by_hand():
    """Three projections and one back, d x d each; N x N logits and N x N weights, d products each."""
    model = nn.MultiheadAttention(16, 2, batch_first=True).to("meta")
    x = torch.empty(1, 5, 16, device="meta")
    found = pela_tables.count(model, lambda: model(x, x, x))
    assert found == Count(4 * (16 * 16 + 16), layers=4 * 5 * 16 * 16, attention=2 * 5 * 5 * 16)
    assert found.flops() == 2 * found.layers and found.flops(attention=True) == 2 * (found.layers + found.attention)


@pytest.mark.parametrize(("answers", "parameters"), [(False, 419_120_131), (True, 580_672_116)])
def test_albef_by_hand(answers, parameters):
    """d = 768: 12 d^2 + 13 d in a layer, 4 d^2 + 6 d more where it attends to the image."""
    d, with_bias = 768, lambda rows, columns: rows * columns + rows
    layer, cross = 12 * d * d + 13 * d, 4 * d * d + 6 * d
    image = with_bias(d, 3 * 16 * 16) + d + 577 * d + 12 * layer + 2 * d
    embeddings = (30522 + 512 + 2) * d + 2 * d
    text = embeddings + 12 * layer + 6 * cross
    answer = embeddings + 6 * (layer + cross) + with_bias(d, d) + 2 * d + 30522
    single = with_bias(2, d) + 1
    expected = 2 * (image + text + answer) if answers else 2 * (image + text + 2 * with_bias(256, d)) + single
    with torch.device("meta"):
        found = sum(p.numel() for p in ALBEF(answers).parameters())
    assert found == expected == parameters


def test_table_1_agrees_with_the_paper(counts):
    """Every model that is built, to half a per cent: parameters, and two for each multiply-add of its layers."""
    built = [row for row in table(1).rows if row.model and row.flops]
    assert len(built) == 9
    for row in built:
        assert all(abs(d) < 0.005 for d in pela_tables.differences(table(1), row, counts).values()), row


def test_the_papers_detector_has_ratio_2_on_every_linear(counts):
    """Table 3: 103.0 M and 1232 GFLOPs; Table 1's Swin-B would make 119.4 M."""
    row = dataclasses.replace(table(3).rows[-1], model="det-swin-every")
    assert all(abs(d) < 0.002 for d in pela_tables.differences(table(3), row, counts).values())
    assert pela_tables.differences(table(3), table(3).rows[-1], counts)["parameters"] > 0.15


def test_a_changed_count_shows(counts):
    """A model with one Linear less makes another page, and a difference without a reason."""
    rows = table(1).rows[-1:]
    alone = dataclasses.replace(table(1), rows=rows)
    lines = pela_tables._table(alone, counts, numbers())
    whole = counts(rows[0].model)

    def changed(key: str) -> Count:
        return dataclasses.replace(whole, parameters=whole.parameters - 1024 * 4096)

    with pytest.raises(ValueError, match="table 1, DeiT-III-Large PELA: differs by .*'parameters': -0.02"):
        pela_tables._table(alone, changed, numbers())
    slightly = dataclasses.replace(whole, layers=whole.layers + whole.layers // 100)
    assert pela_tables._table(alone, lambda key: slightly, numbers()) != lines


def test_every_reason_is_used_and_no_reason_is_idle(counts):
    used = {row.reason for t in pela_tables.TABLES for row in t.rows if row.reason}
    assert used == set(pela_tables.REASONS)
    row = dataclasses.replace(table(1).rows[4], reason="lora")
    with pytest.raises(ValueError, match="table 1, DeiT Base: differs by .* reason lora"):
        pela_tables._table(dataclasses.replace(table(1), rows=(row,)), counts, numbers())


def test_a_missing_package_is_named(counts, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mmseg" else name)
    with pytest.raises(UserError, match="--paper pela needs mmsegmentation, which is not installed"):
        pela_tables.markdown(counts)


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")
def test_committed_tables_are_up_to_date(root, counts):
    found = (root / "docs/pela_tables.md").read_text()
    assert found == pela_tables.markdown(counts), f"make it again: {pela_tables.COMMAND}"


def test_paper_names_one_of_two(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["model_report.py", "--paper", "detr"])
    with pytest.raises(SystemExit):
        load_tool("analysis_tools/model_report.py").main()
    assert "invalid choice: 'detr' (choose from" in capsys.readouterr().err
