"""docs/fidelity.md says what the configs have, and a config that leaves it is noticed."""

import pytest
from conftest import ROOT, load_tool

fidelity = load_tool("analysis_tools/fidelity.py")


def test_the_page_is_what_the_tool_prints(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fidelity.py"])
    fidelity.main()
    assert capsys.readouterr().out == (ROOT / "docs/fidelity.md").read_text()


@pytest.mark.parametrize("section", [s for s in fidelity.sections() if "config" in s], ids=lambda s: s["config"])
def test_a_config_that_leaves_the_table_is_noticed(section, monkeypatch):
    for row in section["rows"]:
        if "at" in row and "why" not in row:
            monkeypatch.setattr(fidelity, "value", lambda cfg, place: -1)
            with pytest.raises(ValueError, match="without a reason"):
                fidelity.line(section, row)
            monkeypatch.undo()


def test_products_and_missing_fields():
    section = dict(title="x", config="pela/pela-distiller_swin-base_imagenet")
    row = dict(what="x", at="optim_wrapper.optimizer.lr * param_scheduler.0.start_factor")
    assert fidelity.ours(section, row) == pytest.approx(5e-8, rel=1e-12)
    assert fidelity.ours(section, dict(at="model.teacher.nothing.at_all")) is None
