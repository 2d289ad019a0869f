"""The check of a GPU, on a CPU: its quick sections, and that nothing of it is lost."""

import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
from conftest import ROOT, load_tool

QUICK = ["environment", "golden", "sampling", "precision", "compile", "waits", "speed", "matrix rate", "profile"]


@pytest.fixture
def tool(monkeypatch):
    """The check as a module, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return load_tool("gpu_check.py")


def call(tool, monkeypatch, tmp_path, *arguments: str) -> dict:
    """Its main() in this process; what it wrote as JSON, 'page' and 'stopped', its exit status."""
    out = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--out", str(out), *arguments])
    stopped = 0
    try:
        tool.main()
    except SystemExit as stop:
        stopped = stop.code
    return dict(json.loads(out.with_suffix(".json").read_text()), page=out.read_text(), stopped=stopped)


def test_quick_sections_on_a_cpu(tmp_path):
    out = tmp_path / "page.md"
    command = [sys.executable, "tools/gpu_check.py", "--device", "cpu", "--out", str(out), "--sections", *QUICK]
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")  # the interpreter is slow
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    sections = json.loads(out.with_suffix(".json").read_text())["sections"]
    skipped = {"waits": "a CPU does not wait", "profile": "a CPU launches no kernels"}
    for name in QUICK:
        status = "SKIPPED" if name in skipped else "PASS"
        assert (sections[name]["status"], sections[name]["why"]) == (status, skipped.get(name, "")), name
        assert f"{status} {name} (" in done.stdout
    page = out.read_text()
    assert page.startswith("# Check of ") and "golden (" in page
    assert "| adamixer, grid_sample, float64: stages |" in page
    assert "| LORS, served folded | inference | 2 | 4 | float32 |" in page and "not run" not in page


def test_a_section_that_breaks_fails_and_the_next_still_runs(tool, monkeypatch, tmp_path):
    def broken(machine, sheet):
        sheet.table("what").append(["found before"])
        raise RuntimeError("no\nluck")

    monkeypatch.setitem(tool.SECTIONS, "golden", (lambda: broken, 60))
    monkeypatch.setitem(tool.SECTIONS, "digits", (lambda: lambda machine, sheet: None, 60))
    found = call(tool, monkeypatch, tmp_path, "--sections", "golden", "digits")
    golden = found["sections"]["golden"]
    assert (golden["status"], golden["why"]) == ("FAIL", "RuntimeError: no")
    assert "in broken" in golden["figures"]["traceback"] and "found before" in found["page"]
    assert found["sections"]["digits"]["status"] == "PASS" and found["stopped"] == "failed: golden"


def test_what_a_section_found_before_its_time_was_up_is_kept(tool, monkeypatch, tmp_path):
    def endless(machine, sheet):
        sheet.figures["first"] = 1
        try:
            time.sleep(60)
        except Exception:  # as a compiler does
            time.sleep(60)

    monkeypatch.setattr(tool, "GRACE", 0)
    monkeypatch.setitem(tool.SECTIONS, "golden", (lambda: endless, 1.2))
    found = call(tool, monkeypatch, tmp_path, "--sections", "golden")["sections"]["golden"]
    assert found["status"] == "SKIPPED" and found["why"].startswith("not done after 1") and found["figures"]["first"]


def test_no_time_left(tool, monkeypatch, tmp_path):
    found = call(tool, monkeypatch, tmp_path, "--sections", "golden", "digits", "--minutes", "0.001")
    assert [sheet["why"] for sheet in found["sections"].values()] == ["no time left"] * 2 and not found["stopped"]
    assert "SKIPPED golden (0 s): no time left" in found["page"]


def test_figures_over_their_limit_and_nan_fail(tool):
    sheet = tool.Sheet()
    sheet.limits({"a": (1.0, 2.0), "b": (0, 0)})
    assert sheet.status == "PASS"
    sheet.limits({"c": (float("nan"), 2.0), "d": (3.0, 2.0)})
    assert sheet.status == "FAIL" and sheet.why == "c nan > 2; d 3 > 2"


def test_waits_are_counted_by_the_line_that_waited(tool, monkeypatch):
    from device_checks.waits import MESSAGE, counted

    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():
        for _ in range(3):
            warnings.warn(MESSAGE, UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    with counted() as found:
        wait()
    [(place, times)] = found.items()
    assert place.startswith("tests/tools/test_gpu_check.py:") and times == 3 and modes == ["warn", 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "device cuda: this machine has no GPU that PyTorch can use: choose cpu"),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--out", "nowhere/page.md"], "--out nowhere/page.md: must be a file in a folder that exists"),
        (["--out", "page.txt"], "--out page.txt: must end with .md"),
    ],
)
def test_refuses(arguments, message, tool, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    with pytest.raises(tool.UserError, match=message):
        tool.main()
