"""The papers' tables: counts by hand and by the papers, reasons where they differ, and the committed pages."""

import importlib
import sys

import pytest
import torch
from conftest import ROOT, load_tool
from torch import nn

from mmdet_lors.errors import UserError

sys.path.append(str(ROOT / "tools/analysis_tools"))
models, render = (importlib.import_module(f"paper_tables.{name}") for name in ("models", "render"))
LORS, PELA = (render.Paper(name) for name in ("lors", "pela"))
MISSING = PELA.missing_packages()
all_packages = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")


@pytest.mark.parametrize(
    ("paper", "ours", "same"),
    [
        ("34", 34.56, True),  # truncated
        ("37", 36.93, True),  # rounded
        ("36", 37.0, False),
        ("100.0", 100, True),
        ("47.5", 47.52, True),
        ("18.3", 18.237, False),
        ("0.36", 0.3594, True),
    ],
)
def test_a_number_agrees_if_it_is_rounded_or_truncated_to_its_decimals(paper, ours, same):
    assert render.agrees(paper, ours) == same


@pytest.mark.parametrize(
    ("model", "total", "decoder", "tolerance"),
    [
        ("plain-100", 104, 12, 0.05),
        ("lors-100", 110, 18, 0.05),
        ("lors-300", 149, 56, 0.05),
        # The paper's 39 cannot be the decoder that it says takes 12 for 100 queries: reason "more-queries".
        ("plain-300", 132, 39, 0.06),
    ],
)
def test_gflops_are_near_the_lors_papers(model, total, decoder, tolerance):
    assert LORS.counts[model]["GFLOPs"] == pytest.approx(total, rel=0.03)
    assert LORS.counts[model]["decoder GFLOPs"] == pytest.approx(decoder, rel=tolerance)


def test_ablations_are_the_papers():
    """Tables 6, 7 and 8, rounded or truncated as the paper does."""
    for table in LORS.tables[5:8]:
        for row in table["rows"]:
            [(paper, ours)] = LORS.differences(table, row).values()
            assert render.agrees(paper, ours), row


def test_products_of_layers_and_of_attention_by_hand():
    """Three projections and one back, d x d each; N x N logits and N x N weights, d products each."""
    model = nn.MultiheadAttention(16, 2, batch_first=True).to("meta")
    x = torch.empty(1, 5, 16, device="meta")
    layers, attention = 4 * 5 * 16 * 16, 2 * 5 * 5 * 16
    assert models.count(model, lambda: model(x, x, x)) == {
        "parameters, M": 4 * (16 * 16 + 16) / 1e6,
        "GFLOPs": 2 * layers / 1e9,
        "with attention's products": 2 * (layers + attention) / 1e9,
    }


@all_packages
@pytest.mark.parametrize(("task", "parameters"), [("retrieval", 419_120_131), ("answers", 580_672_116)])
def test_albef_by_hand(task, parameters):
    """d = 768: 12 d^2 + 13 d in a layer, 4 d^2 + 6 d more where it attends to the image."""
    d, with_bias = 768, lambda rows, columns: rows * columns + rows
    layer, cross = 12 * d * d + 13 * d, 4 * d * d + 6 * d
    image = with_bias(d, 3 * 16 * 16) + d + 577 * d + 12 * layer + 2 * d
    embeddings = (30522 + 512 + 2) * d + 2 * d
    text = embeddings + 12 * layer + 6 * cross
    answer = embeddings + 6 * (layer + cross) + with_bias(d, d) + 2 * d + 30522
    single = with_bias(2, d) + 1
    expected = 2 * (image + text + answer) if task == "answers" else 2 * (image + text + 2 * with_bias(256, d)) + single
    assert round(1e6 * models.albef(task)["parameters, M"]) == expected == parameters


def test_pela_table_1_agrees_with_the_paper():
    """Every model that is built, to half a per cent: parameters, and two for each multiply-add of its layers."""
    table = PELA.tables[0]
    built = [row for row in table["rows"] if "model" in row and "only" not in row]
    assert len(built) == 9
    for row in built:
        found = PELA.differences(table, row)
        assert list(found) == ["parameters", "GFLOPs"]
        assert all(ours == pytest.approx(float(paper), rel=0.005) for paper, ours in found.values()), row


def test_the_papers_swins_have_ratio_2_on_every_linear():
    """Tables 2 and 3: 79.3 and 103.0 M; Table 1's Swin-B would make 95.7 and 119.4 M."""
    for number, third in ((1, 95.7), (2, 119.4)):
        table = PELA.tables[number]
        row = next(row for row in table["rows"] if row["cells"][:2] == ["Swin-Base", "PELA"])
        found = PELA.differences(table, row).values()
        assert all(ours == pytest.approx(float(paper), rel=0.003) for paper, ours in found) and "reason" not in row
        other = row["model"].replace("pela", "third")
        assert round(PELA.counts[other]["parameters, M"], 1) == third


def test_the_shares_are_those_of_the_papers_tflops():
    for table in PELA.tables[3:5]:
        rows = [PELA.printed(table, row) for row in table["rows"]]
        whole = next(float(row["TFLOPs (paper)"]) for row in rows if row["model"] == "ALBEF Base")
        for row in rows:
            if (share := row["per cent of Base's (paper)"]) != "-":
                assert share == f"{100 * float(row['TFLOPs (paper)']) / whole:.1f}", row


def test_a_changed_count_shows(monkeypatch):
    """A model with one Linear less makes another page, and a difference without a reason."""
    table, row = PELA.tables[0], PELA.tables[0]["rows"][-1]
    cells, whole = PELA.row(table, row), PELA.counts["deit3-pela"]
    monkeypatch.setitem(PELA.counts, "deit3-pela", whole | {"GFLOPs": 1.01 * whole["GFLOPs"]})
    assert PELA.row(table, row) != cells
    less = whole["parameters, M"] - 1024 * 4096 / 1e6
    monkeypatch.setitem(PELA.counts, "deit3-pela", whole | {"parameters, M": less})
    with pytest.raises(ValueError, match=r"Table 1: .*'DeiT-III-Large', 'PELA'.* differs in \['parameters'\]"):
        PELA.row(table, row)


@pytest.mark.parametrize(
    ("paper", "number", "row", "changed"),
    [
        (LORS, 4, 0, dict(reason="lorsa")),
        (LORS, 4, 1, dict(reason=None)),
        (PELA, 1, 4, dict(reason="lora")),
        (PELA, 1, 2, dict(reason=None)),  # not built
        (PELA, 1, 4, dict(only=["parameters, M"])),
    ],
)
def test_a_difference_needs_a_reason_and_a_reason_a_difference(paper, number, row, changed):
    table = paper.tables[number - 1]
    with pytest.raises(ValueError, match=f"Table {number}: .* differs in .*, reason {changed.get('reason')}"):
        paper.verdict(table, table["rows"][row] | changed)


@pytest.mark.parametrize("paper", [LORS, PELA], ids=["lors", "pela"])
def test_every_reason_is_used_and_every_name_of_one_is_known(paper):
    used = {row["reason"] for table in paper.tables for row in table["rows"] if "reason" in row}
    assert {reason for reason in used if " " not in reason} == set(paper.reasons)


def test_a_reason_is_printed_with_its_number():
    assert LORS.verdict(LORS.tables[3], LORS.tables[3]["rows"][1]) == "**decoder parameters** [5]"


def test_a_row_has_a_cell_for_every_column_of_the_papers():
    table = LORS.tables[3]
    with pytest.raises(ValueError, match="shorter"):
        LORS.row(table, dict(table["rows"][3], cells=["x", "x", 35]))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mmseg" else name)
    with pytest.raises(UserError, match="--paper pela needs mmsegmentation, which is not installed"):
        PELA.markdown()


@pytest.mark.parametrize(
    ("paper", "page"),
    [(LORS, "paper_tables"), pytest.param(PELA, "pela_tables", marks=all_packages)],
    ids=["lors", "pela"],
)
def test_committed_tables_are_up_to_date(paper, page):
    found = (ROOT / f"docs/{page}.md").read_text()
    assert found == paper.markdown(), f"make it again: tools/analysis_tools/model_report.py --paper {paper.name}"


def test_paper_names_one_of_two(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["model_report.py", "--paper", "detr"])
    with pytest.raises(SystemExit):
        load_tool("analysis_tools/model_report.py").main()
    assert "invalid choice: 'detr' (choose from" in capsys.readouterr().err
