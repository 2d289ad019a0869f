"""How train.py, test.py and infer.py start: what is imported when, and what the process is told before."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, load_tool

TOOLS = ["train.py", "test.py", "infer.py"]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--no-such-option", 2)])
def test_the_command_line_is_answered_before_anything_heavy_is_imported(tool, argument, status):
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        f"sys.argv = [{tool!r}, {argument!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'tools' / tool)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code or 0, sorted({'torch', 'mmdet', 'mmcv', 'mmdet_lors'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, True),
        ({"GOMP_SPINCOUNT": "7"}, False),
        ({"OMP_WAIT_POLICY": "active"}, False),
    ],
)
def test_openmp_waits_as_the_environment_says_or_briefly(monkeypatch, given, told):
    start = load_tool("launch/start.py")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    start.prepare_process()
    assert os.environ.get("GOMP_SPINCOUNT") == (str(start.SPIN_COUNT) if told else given.get("GOMP_SPINCOUNT"))
