"""How tools start: what is imported when, and what the process is told before."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

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
    """``python -m``, where importing torch ends the process."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    env = os.environ | dict(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    return lambda *words: subprocess.run([sys.executable, "-m", *words], env=env, capture_output=True, text=True)


def test_help_of_an_installed_tool_imports_no_torch(python_m):
    for words, status in ((["--help"], 0), (["trian"], 1), (["train", "--help"], 0), (["train"], 2)):
        done = python_m("mmdet_lors", *words)
        assert done.returncode == status and "torch is imported" not in done.stderr, done.stderr
    assert done.stderr.startswith("usage: train.py")
    assert python_m("mmdet_lors", "train", "config.py").stderr == "torch is imported\n"


def test_another_package_that_is_run_imports_this_one_whole(python_m, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").write_text("import mmdet_lors")
    (tmp_path / "theirs/__main__.py").touch()
    assert python_m("theirs", "mmdet_lors").stderr == "torch is imported\n"
