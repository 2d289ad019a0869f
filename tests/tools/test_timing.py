"""Things that are timed take turns, warm-up does not count, and ratios are medians within the rounds."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import load_tool

from mmdet_lors.analysis import timing
from mmdet_lors.errors import UserError

STACK = "analysis_tools/benchmark_stack.py"


def turns(calls: list[str], **fixed) -> dict[str, list[float]]:
    """Three rounds of a and b, each of which takes as long as its turn's number."""

    def timed(name: str) -> float:
        calls.append(name)
        return float(calls.count(name))

    return timing.interleaved({name: lambda name=name: timed(name) for name in "ab"}, 3, **fixed)


def test_everybody_has_a_turn_a_round_and_warm_up_does_not_count():
    calls: list[str] = []
    assert turns(calls) == dict(a=[2.0, 3.0, 4.0], b=[2.0, 3.0, 4.0])
    assert "".join(calls) == "abababab"


def test_alternating_rounds_go_backwards():
    calls: list[str] = []
    assert turns(calls, warm_up=0, alternate=True) == dict(a=[1.0, 2.0, 3.0], b=[1.0, 2.0, 3.0])
    assert "".join(calls) == "abbaab"


def test_ratio_is_the_median_within_rounds():
    found = dict(ours=[2.0, 30.0, 3.0], base=[1.0, 10.0, 2.0])
    assert timing.ratio(found, "ours", "base") == 2.0


def test_seconds_are_those_of_one_step(monkeypatch):
    clock, calls = iter([10.0, 16.0]), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.seconds(lambda: calls.append(1), "cpu", steps=3) == 2.0 and len(calls) == 3


def test_a_gpu_is_waited_for_before_and_after(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    timing.seconds(lambda: events.append("call"), "cuda")
    timing.seconds(lambda: events.append("call"), "cpu")
    assert events == ["wait", "call", "wait", "call"]


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="needs /proc/stat, of Linux")
def test_other_work_is_what_this_process_did_not_do():
    """One process of its own works; what this one does meanwhile does not count as others'."""

    def half_a_second() -> float:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        return 0.25

    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        beside = timing.observed(half_a_second)
        other.kill()
    assert beside.seconds == 0.25 and beside.wall >= 0.5
    assert beside.others > 0.1


def test_other_work_is_not_known_without_proc(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert math.isnan(timing.observed(lambda: 1.0).others)


def test_own_work_is_not_others(monkeypatch):
    busy, own = iter([100.0, 103.5]), iter([10.0, 13.0])
    monkeypatch.setattr(timing, "busy", lambda: next(busy))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(own))
    assert timing.observed(lambda: 1.0).others == 0.5


SMALL = ["--batch", "1", "--size", "8", "--turns", "2", "--steps", "1", "--warm-up", "0"]


def test_benchmark_of_a_shared_stack_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", [STACK, *SMALL, "--json", str(out)])
    load_tool(STACK).main()
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert figures["parameters"]["LORST"] < figures["parameters"]["plain"]
    assert {name: len(times) for name, times in figures["seconds"].items()} == dict(plain=2, LORST=2)
    assert f"LORST takes {figures['ratio']:.3f} x the time of plain" in printed


def test_benchmark_of_a_shared_stack_refuses_a_slow_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", [STACK, *SMALL, "--max-ratio", "1e-9"])
    with pytest.raises(UserError, match=r"x the time of plain, more than 1e-09"):
        load_tool(STACK).main()
