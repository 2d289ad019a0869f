"""How the tools start: what is imported when, and what the process is told before."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, load_tool

SCRIPTS = [path for path in (ROOT / "tools").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
# Those in launch/ are behind the launch scripts: torchrun answers there.
TOOLS = sorted(path.relative_to(ROOT / "tools").as_posix() for path in SCRIPTS if path.parent.name != "launch")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--no-such-option", 2)])
def test_the_command_line_is_answered_before_anything_heavy_is_imported(tool, argument, status):
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str((ROOT / 'tools' / tool).parent)!r})\n"
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


def test_a_tool_of_the_installed_package_starts_alike(tmp_path):
    # Says what OpenMP has been told when torch is first looked for.
    hook = """import os, sys
class Told:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            print("torch", os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Told())
"""
    (tmp_path / "sitecustomize.py").write_text(hook)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env["PYTHONPATH"] = paths

    def told(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "mmdet_lors", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return [line for line in done.stdout.splitlines() if line.startswith("torch")]

    assert told("--help") == told("train", "--help") == told("trian") == []
    assert told("train", "no_such_config.py") == [f"torch {load_tool('launch/start.py').SPIN_COUNT}"]
