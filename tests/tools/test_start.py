"""How tools start: what is imported when, and what the process is told before."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, free_port, load_tool

TOOLS = sorted(
    path.relative_to(ROOT / "tools").as_posix()
    for path in (ROOT / "tools").rglob("*.py")
    if "__main__" in path.read_text() and path.name != "torchrun.py"  # its options are torch's own
)
HEAVY = ["torch", "mmdet", "mmcv", "mmengine.runner", "mmdet_lors", "timm", "matplotlib", "scipy"]


def test_tools_are_found():
    assert {"train.py", "gpu_check.py", "analysis_tools/model_report.py"} < set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_command_line_is_answered_before_anything_heavy_is_imported(tool):
    path = ROOT / "tools" / tool
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY}))  # importing them fails\n"
        f"sys.path.insert(0, {str(path.parent)!r})\n"
        "for argument in ('--help', '--no-such-option'):\n"
        "    sys.argv = ['tool', argument]\n"
        "    try:\n"
        f"        runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print('status', end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("usage: "), done.stderr
    assert re.findall(r"^status (\d)", done.stdout, re.M) == ["0", "2"] and "error: " in done.stderr


@pytest.fixture
def python_m(tmp_path):
    """``python -m``, where importing torch ends the process and shows how OpenMP waits."""
    (tmp_path / "torch.py").write_text("import os\nraise SystemExit(f'spins {os.environ.get(\"GOMP_SPINCOUNT\")}')\n")
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    return lambda *words: subprocess.run([sys.executable, "-m", *words], env=env, capture_output=True, text=True)


def test_help_of_an_installed_tool_imports_no_torch(python_m):
    for words, status in ((["--help"], 0), (["trian"], 1), (["train", "--help"], 0), (["train"], 2)):
        done = python_m("mmdet_lors", *words)
        assert done.returncode == status and "spins" not in done.stderr, done.stderr
    assert done.stderr.startswith("usage: train.py")


def test_an_installed_tool_says_how_openmp_waits_before_torch_is_imported(python_m):
    spins = load_tool("launch/start.py").SPIN_COUNT
    assert python_m("mmdet_lors", "train", "config.py").stderr in (f"spins {spins}\n", "spins 0\n")


def test_the_launcher_says_it_to_all_processes_of_a_run(tmp_path):
    shows = tmp_path / "shows.py"
    shows.write_text("import os; print(os.environ['GOMP_SPINCOUNT'], flush=True)")
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= dict(PYTHON=sys.executable, PORT=str(free_port()))
    command = ["bash", "-c", f"source tools/launch/dist.sh; launch 2 {shows}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout in ("0\n0\n", "10000\n10000\n"), done.stderr


def test_another_package_that_is_run_imports_this_one_whole(python_m, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").write_text("import mmdet_lors")
    (tmp_path / "theirs/__main__.py").touch()
    assert python_m("theirs", "mmdet_lors").stderr == "spins None\n"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}),
        ({"GOMP_SPINCOUNT": "7"}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}),
        ({"OMP_WAIT_POLICY": "active"}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, {"GOMP_SPINCOUNT": "10000"}),
    ],
)
def test_a_process_is_told_what_its_environment_does_not_say(monkeypatch, given, told):
    monkeypatch.setattr(os, "environ", dict(given))
    start = load_tool("launch/start.py")
    monkeypatch.setattr(start, "cores_are_shared", lambda: False)
    start.prepare_process()
    assert os.environ == given | told


@pytest.mark.parametrize(
    ("meanwhile", "spins"),
    [
        ("cpu0 0 0 0 10 0 0 0 0\ncpu1 1 0 1 8 0 0 0 0", "10000"),  # idle, but for two ticks of the kernel's and its own
        ("cpu0 0 0 0 0 10 0 0 0\ncpu1 0 0 0 10 0 0 0 0", "10000"),  # waiting for a disk is idle
        ("cpu0 6 0 0 4 0 0 0 0\ncpu1 0 0 0 10 0 0 0 0", "0"),
        ("cpu0 0 6 0 4 0 0 0 0\ncpu1 0 0 0 10 0 0 0 0", "0"),  # work of low priority
        ("cpu0 0 0 0 4 0 0 0 6\ncpu1 0 0 0 10 0 0 0 0", "0"),  # stolen by another virtual machine
        ("cpu0 0 0 0 10 0 0 0 0\ncpu1 0 0 0 10 0 0 0 0\ncpu2 10 0 0 0 0 0 0 0", "10000"),  # a core that is not ours
        ("cpu0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0", "10000"),  # a sandbox that does not say
    ],
)
def test_threads_sleep_at_once_where_others_compute(monkeypatch, tmp_path, meanwhile, spins):
    start, system = load_tool("launch/start.py"), tmp_path / "stat"
    system.write_text("cpu 9 9 9 9 9 9 9 9\ncpu0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0\nintr 5")
    monkeypatch.setattr(start, "SYSTEM", system)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(start.time, "sleep", lambda seconds: system.write_text(meanwhile))
    monkeypatch.setattr(os, "environ", {})
    start.prepare_process()
    assert os.environ["GOMP_SPINCOUNT"] == spins


def test_outside_linux_no_core_is_called_shared(monkeypatch, tmp_path):
    start = load_tool("launch/start.py")
    monkeypatch.setattr(start, "SYSTEM", tmp_path / "none")
    assert not start.cores_are_shared()
