"""How a process uses a CPU: freed memory is kept, waiting threads make room, convolutions are forgotten."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mmdet_lors.engine import cpu

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the allocator and OpenMP are glibc's and gcc's")


def python(code: str, settings: dict[str, str], threads: int = 1) -> str:
    """What it prints in a process of its own, without this one's settings of the allocator, OpenMP and oneDNN."""
    ours = re.compile("MALLOC_|GLIBC_|GOMP_|OMP_|ONEDNN_")
    environment = {name: value for name, value in os.environ.items() if not ours.match(name)}
    environment |= dict(OMP_NUM_THREADS=str(threads)) | settings
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    return done.stdout


FAULTS = """
import resource
from mmdet_lors.engine.machine import use_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(b"1") * 200_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
use_device("cpu")
faults()
print(first, faults())
"""


@LINUX
@pytest.mark.parametrize(("settings", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_a_large_block_is_used_again_without_page_faults_unless_the_user_has_chosen(settings, kept):
    first, later = map(int, python(FAULTS, settings).split())
    assert first > 1000 and (later < 100) is kept


CONVOLUTIONS = """
import torch
from mmdet_lors.engine import cpu, machine

cpu.PRIMITIVES = 1
machine.use_device("cpu")
with torch.no_grad():
    for size in (40, 60, 40):
        torch.nn.functional.conv2d(torch.ones(1, 32, size, size), torch.ones(32, 32, 3, 3))
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("settings", "kept"), [({}, False), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, True)])
def test_onednn_keeps_so_many_convolutions_unless_the_user_has_chosen(settings, kept):
    shown = python(CONVOLUTIONS, settings | dict(ONEDNN_VERBOSE="2"))
    found = re.findall(r"create:cache_(hit|miss),cpu,convolution,.*_ih(\d+)", shown)
    assert found == [("miss", "40"), ("miss", "60"), ("hit" if kept else "miss", "40")], shown


WAITS = """
import os, time, torch
from mmdet_lors.engine.cpu import IdleTeams

def waiting():
    "Seconds that the waiting threads of 30 small operations take."
    before, x = time.process_time(), torch.ones(1 << 18)
    for _ in range(30):
        x.add_(1)
        time.sleep(0.01)
    return time.process_time() - before

waiting()
first = waiting()
teams = IdleTeams(len(os.sched_getaffinity(0)), torch.get_num_threads())
beside = waiting()
teams.close()
print(first, beside, waiting())
"""


@LINUX
def test_threads_wait_asleep_beside_idle_teams_and_as_before_without():
    first, beside, after = map(float, python(WAITS, {}, threads=2).split())
    assert beside < first / 2 and beside < after / 2


SHARES = """
import os, subprocess, sys, time, torch
from mmdet_lors.engine import cpu, machine

torch.ones(1 << 18).add_(1)
before, cpu.INTERVAL, deadline = len(os.listdir("/proc/self/task")), 0.1, time.monotonic() + 30
machine.use_device("cpu")
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
try:  # the thread that watches, one that owns a team, and the team's other
    while len(os.listdir("/proc/self/task")) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.1)
finally:
    [process.kill() for process in busy]
print(len(os.listdir("/proc/self/task")) - before)
"""


@LINUX
@pytest.mark.parametrize(("settings", "shares"), [({}, True), ({"GOMP_SPINCOUNT": "300000"}, False)])
def test_a_process_shares_its_cores_with_busy_ones_unless_the_user_has_chosen(settings, shares):
    code = SHARES if shares else SHARES.replace("+ 30", "+ 2")
    assert (int(python(code, settings, threads=2)) >= 3) is shares


class Teams(list):
    """Counts idle teams, as IdleTeams is made and closed."""

    def __call__(self, cores: int, threads: int) -> SimpleNamespace:
        self.append((cores, threads))
        return SimpleNamespace(close=lambda: self.append("closed"))


@pytest.mark.parametrize(
    ("threads", "others", "found"),
    [
        (4, [0, 0.9, 0], []),
        (4, [0, 1.1, 3, 0.9], [(4, 4), "closed"]),
        (2, [2, 2.4], []),  # two processes of two threads leave each other in peace
        (2, [2.6, 2, 2.6], [(4, 2), "closed", (4, 2)]),
    ],
)
def test_teams_idle_while_others_need_more_than_a_quarter_of_the_cores_in_use(monkeypatch, threads, others, found):
    """``others``: how many of four cores they take in each second."""
    clock, teams = [(0.0, 5.0, 3.0)], Teams()
    for taken in others:
        clock.append((clock[-1][0] + 1, clock[-1][1] + 1.5 + taken, clock[-1][2] + 1.5))  # 1.5 are its own
    seconds = iter(clock)
    monkeypatch.setattr(cpu, "_seconds", lambda cores: next(seconds))
    monkeypatch.setattr(cpu, "IdleTeams", teams)
    monkeypatch.setattr(cpu, "INTERVAL", 0)
    with pytest.raises(StopIteration):
        cpu.Watch({0, 1, 2, 3}, threads).run()
    assert teams == found


def test_busy_seconds_are_those_of_the_process_s_cores_and_of_any_work(monkeypatch, tmp_path):
    """user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice (in user and nice already)."""
    system = tmp_path / "stat"
    system.write_text("cpu 9 9 9 9\ncpu0 1 20 300 9 9 4000 50000 600000 9 9\ncpu1 9 9 9 9\ncpu3 1 1 1 9 9 1 1 1 9 9\n")
    monkeypatch.setattr(cpu, "SYSTEM", system)
    monkeypatch.setattr(os, "sysconf", lambda name: 2, raising=False)
    assert cpu._seconds({0, 3})[1] == (654321 + 6) / 2


@pytest.mark.parametrize(
    ("threads", "file", "settings"),
    [
        (1, "stat", {}),
        (4, "none", {}),
        (4, "stat", {"GOMP_SPINCOUNT": "7"}),
        (4, "stat", {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_one_thread_other_systems_and_the_users_choice_are_left_alone(monkeypatch, tmp_path, threads, file, settings):
    (tmp_path / "stat").touch()
    monkeypatch.setattr(cpu, "SYSTEM", tmp_path / file)
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "Watch", lambda *_: pytest.fail("watches"))
    monkeypatch.setattr(os, "environ", settings)
    cpu.share_cores.__wrapped__()
    assert os.environ == settings
