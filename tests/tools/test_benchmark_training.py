"""tools/analysis_tools/benchmark_training.py: environments in turn, a process each, and what it refuses."""

import re

import pytest
from conftest import LORS_DIGITS, load_tool, refused

TOOL = "analysis_tools/benchmark_training.py"


def test_environments_take_turns_and_are_compared_within_a_round(monkeypatch, capsys, tmp_path):
    calls, slow = [], iter([1.0, 2.0, 20.0, 10.0])  # the machine is ten times slower in the second round

    def one_run(config, environment, processes, lines, options):
        calls.append(environment)
        return dict(seconds=next(slow), peak=1.5 if environment else 1.0)

    tool = load_tool(TOOL)
    monkeypatch.setattr(tool, "one_run", one_run)
    arguments = [LORS_DIGITS, "--rounds", "2", "--beside", "nothing", "--environments", "", "A=1,B=2"]
    monkeypatch.setattr("sys.argv", [TOOL, *arguments, "--out", str(tmp_path / "page.md")])
    tool.main()
    assert calls == [{}, {"A": "1", "B": "2"}, {"A": "1", "B": "2"}, {}]
    page = (tmp_path / "page.md").read_text()
    assert "| (its own) | 5.500 [1.000-10.000] | 1.00 | 1.00 | 1.00 |" in page
    assert "| A=1,B=2 | 11.000 [2.000-20.000] | 2.00 | 1.50 | 1.50 |" in page
    assert capsys.readouterr().out.strip() in page


def test_a_run_reports_its_iterations_and_memory(tiny_digits):
    options = [f"train_dataloader.dataset.data_root={tiny_digits}", f"val_dataloader.dataset.data_root={tiny_digits}"]
    options += [f"val_evaluator.ann_file={tiny_digits}/annotations/val.json", "train_dataloader.batch_size=1"]
    options += ["default_hooks.logger.interval=1", "train_dataloader.dataset.indices=3"]
    found = load_tool(TOOL).one_run(LORS_DIGITS, {"GOMP_SPINCOUNT": "0"}, 1, 2, options)
    assert 0 < found["seconds"] < 60 and 0.1 < found["peak"] < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--processes and --rounds must be 1 or more, --lines 2 or more"),
        (["--environments", "A"], "--environments A: must be NAME=VALUE, several separated by commas"),
        (["--beside", "nothing", "--cfg-options", "modle=1"], "tools/train.py .* failed: error: .*modle"),
    ],
)
def test_mistakes_are_named(arguments, message, monkeypatch, capsys):
    assert re.search(message, refused(TOOL, [LORS_DIGITS, *arguments], monkeypatch, capsys))
