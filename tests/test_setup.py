"""What the set-up promises, with a pip that installs nothing: no network, no compiler, seconds."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pip
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FILES = [
    "tools/setup_env.sh",
    "tools/setup_env.py",
    "tools/run_tests.sh",
    ".ci/run",
    "requirements.txt",
    "setup.py",
]

# Writes down how it was called and leaves in site-packages what the set-up looks at.
FAKE_PIP = """
import json, os, pathlib, sys
site = pathlib.Path(__file__).parent.parent
arguments = sys.argv[3:]
pairs = zip(arguments, arguments[1:])
files = [pathlib.Path(file).read_text().split("\\n") for option, file in pairs if option in ("-r", "-c")]
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(arguments + files), file=calls)

def add(name, version, **extra):
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    for file, text in extra.items():
        (info / f"{file}.json").write_text(text)
    (site / name).mkdir(exist_ok=True)
    (site / name / "__init__.py").write_text("")

when, _, message = os.environ.get("FAIL", "").partition("|")
if when and when in (arguments[0], arguments[1]):
    sys.exit(message)
if "-r" in arguments:
    add("torch", os.environ["TORCH"])
    (site / "torch" / "version.py").write_text("__version__ = %r; cuda = None" % os.environ["TORCH"])
    add("cv2", "5")
    add("mmdet", "3.3.0")
if arguments[0] == "wheel":
    folder = pathlib.Path(arguments[-1])
    folder.mkdir()
    (folder / "mmcv-2.1.0-any.whl").write_text("")
if arguments[-1].endswith(".whl"):
    add("mmcv", "2.1.0", direct_url=json.dumps({"url": pathlib.Path(arguments[-1]).as_uri()}))
    (site / "mmcv" / "ops.py").write_text("")
"""


class Trial:
    """A copy of the set-up's files, with nothing on PATH but what a test put there."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "repo"
        self.venv = self.root / ".venv"
        self.cache = folder / "cache"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.bin.mkdir(parents=True)
        for name in FILES:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for name in ["bash", "dirname", "sed"]:
            (self.bin / name).symlink_to(shutil.which(name))
        self.add("python3.11", f'exec "{sys.executable}" "$@"')
        self.add("c++", "")
        self.site = self.venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"

    def add(self, name: str, script: str) -> Path:
        """Puts an executable on PATH."""
        file = self.bin / name
        file.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        file.chmod(0o755)
        return file

    def make_venv(self) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.venv], check=True)
        (self.site / "pip").mkdir()
        for name in ["__init__", "_internal"]:
            (self.site / "pip" / f"{name}.py").write_text("")
        (self.site / "pip" / "__main__.py").write_text(FAKE_PIP)
        (self.site / "pip" / "_vendor").symlink_to(Path(pip.__file__).parent / "_vendor")

    def run(self, *arguments: str, script: str = "tools/setup_env.sh", **settings: str):
        env = {
            "PATH": str(self.bin),
            "HOME": str(self.root.parent),
            "MMDET_LORS_CACHE": str(self.cache),
            "MMDET_LORS_DISK_GB": "0",
            "CALLS": str(self.calls_file),
            "TORCH": "2.11.0",
            # Should a test ever reach the real pip, it may not touch the environment that the tests run in.
            "PIP_NO_INDEX": "1",
            "PIP_REQUIRE_VIRTUALENV": "1",
            **settings,
        }
        self.calls_file.write_text("")
        command = ["bash", str(self.root / script), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def calls(self) -> list[list]:
        """How pip was called in the last run."""
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def builds(self) -> int:
        return sum(call[0] == "wheel" for call in self.calls())

    def wheels(self) -> list[str]:
        return sorted(folder.name for folder in self.cache.glob("wheels/*"))


@pytest.fixture
def trial(tmp_path):
    return Trial(tmp_path)


@pytest.fixture
def setup_env(monkeypatch):
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ["MMCV_CUDA", "TORCH_CUDA_ARCH_LIST"]:
        monkeypatch.delenv(name, raising=False)
    return module


def fails_with_one_line(answer, text: str) -> bool:
    lines = answer.stderr.splitlines()
    return answer.returncode == 1 and len(lines) == 1 and lines[0].startswith("setup: ") and text in lines[0]


def test_unsupported_python_is_named(trial):
    old = trial.add("python3.9", '[[ $2 == *exit* ]] && exit 1; echo "Python 3.9.18"')
    answer = trial.run(PYTHON=str(old))
    assert fails_with_one_line(answer, f"Python 3.10 to 3.12 is needed, {old} is Python 3.9.18")


def test_python_that_does_not_run_is_passed_over(trial):
    trial.add("python3.11", "exit 127")
    assert fails_with_one_line(trial.run(), "python3 is not there")


def test_missing_compiler_stops_before_anything_is_written(trial):
    (trial.bin / "c++").unlink()
    assert fails_with_one_line(trial.run(), "no C++ compiler (c++, g++), mmcv cannot be built: apt-get install g++")
    assert not trial.venv.exists() and not trial.cache.exists()


def test_full_disk_stops_before_anything_is_written(trial):
    assert fails_with_one_line(trial.run(MMDET_LORS_DISK_GB="1e9"), "not enough disk: ")
    assert not trial.venv.exists() and not trial.cache.exists()


def test_missing_network_names_the_package_and_the_log(trial):
    trial.make_venv()
    output = (
        "Collecting torch==2.11.0\n"
        "WARNING: Retrying after connection broken by 'NewConnectionError(failure in name resolution)'\n"
        "ERROR: No matching distribution found for torch==2.11.0"
    )
    answer = trial.run(FAIL=f"-r|{output}")
    last = answer.stderr.splitlines()[-1]
    assert answer.returncode == 1
    assert last.startswith("setup: no network: pip could not download torch==2.11.0 (log: ")
    assert "Retrying" in Path(re.search(r"log: (.*)\)", last)[1]).read_text()


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("ERROR: [Errno 28] No space left on device", "no space left on the disk while building mmcv"),
        ("error: externally-managed-environment", "activate an environment or drop --no-venv"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "out of memory while building mmcv"),
        (
            "  /a/b/nms.cpp:3:10: fatal error: x.h: No such file",
            "nms.cpp:3:10: fatal error: x.h: No such file",
        ),
        ("ERROR: No matching distribution found for a==1", "pip finds no a==1"),
        ("ERROR: something new", "building mmcv failed: something new"),
    ],
)
def test_failures_of_pip_are_explained_in_one_line(setup_env, output, line):
    explained = setup_env.explain("building mmcv", output, Path("pip.log"))
    assert line in explained and "\n" not in explained


def test_second_run_does_nothing(trial):
    trial.make_venv()
    assert trial.run().returncode == 0
    assert trial.builds() == 1
    answer = trial.run()
    assert answer.returncode == 0
    assert answer.stderr == f"setup: {trial.venv} is up to date\n"
    assert trial.calls() == []


def test_print_python_prints_only_the_path(trial):
    trial.make_venv()
    assert trial.run("--print-python").stdout == f"{trial.venv}/bin/python\n"
    assert trial.run("--print-python").stdout == f"{trial.venv}/bin/python\n"
    assert trial.run().stdout == ""


def test_changed_torch_gets_its_own_mmcv_and_stays(trial):
    trial.make_venv()
    trial.run()
    (trial.site / "torch" / "version.py").write_text("__version__ = '2.12.0+cpu'; cuda = None")
    assert trial.run().returncode == 0
    assert trial.builds() == 1
    assert not any("-r" in call for call in trial.calls())
    assert [re.search("torch-(.*)-cp3", name)[1] for name in trial.wheels()] == ["2.11.0", "2.12.0+cpu"]


def test_changed_requirements_are_installed(trial):
    trial.make_venv()
    trial.run()
    with (trial.root / "requirements.txt").open("a") as file:
        file.write("einops==0.8.1\n")
    assert trial.run().returncode == 0
    assert "einops==0.8.1" in next(call for call in trial.calls() if "-r" in call)[-1]
    assert trial.builds() == 0


def test_cached_wheel_serves_the_next_environment(trial):
    trial.make_venv()
    trial.run()
    shutil.rmtree(trial.venv)
    trial.make_venv()
    assert trial.run().returncode == 0
    assert trial.builds() == 0
    assert any(str(call[-1]).endswith(".whl") for call in trial.calls())


def test_failed_build_leaves_no_wheel_and_the_next_run_goes_on(trial):
    trial.make_venv()
    answer = trial.run(FAIL="wheel|ERROR: broken")
    assert answer.returncode == 1 and "building mmcv failed: broken" in answer.stderr
    assert trial.wheels() == [] and not (trial.venv / "mmdet_lors.stamp").exists()
    assert trial.run().returncode == 0
    assert len(trial.wheels()) == 1


def test_other_python_in_the_venv_is_not_overwritten(trial):
    (trial.venv / "bin").mkdir(parents=True)
    python = trial.venv / "bin" / "python"
    python.write_text("#!/bin/sh\necho 3.9\n")
    python.chmod(0o755)
    answer = trial.run(PYTHON=sys.executable)
    assert fails_with_one_line(answer, f"{trial.venv} has Python 3.9, not ")


def test_wheel_key_tells_torch_python_and_gpu_apart(setup_env):
    keys = {
        setup_env.wheel_key("2.11.0+cu130", ""),
        setup_env.wheel_key("2.11.0+cpu", ""),
        setup_env.wheel_key("2.11.0+cu130", "9.0"),
        setup_env.wheel_key("2.11.0+cu130", "8.0;9.0"),
    }
    assert len(keys) == 4
    python = f"cp3{sys.version_info.minor}"
    assert all(key.startswith("mmcv-2.1.0-torch-2.11.0+c") and python in key for key in keys)
    assert not any(set(key) & set("; /*") for key in keys)


@pytest.mark.parametrize(
    ("gpus", "nvcc", "choice", "archs"),
    [
        ([], "13", "", ""),
        (["9.0"], "13", "", "9.0"),
        (["8.0", "9.0"], "13", "", "8.0;9.0"),
        (["9.0"], "12", "", ""),
        (["9.0"], "", "", ""),
        (["9.0"], "13", "0", ""),
        (["9.0"], "", "1", "9.0"),
    ],
)
def test_cuda_operators_need_a_gpu_and_the_nvcc_of_torch(setup_env, monkeypatch, gpus, nvcc, choice, archs):
    monkeypatch.setattr(setup_env, "gpus", lambda: gpus)
    monkeypatch.setattr(setup_env, "nvcc_major", lambda: nvcc)
    monkeypatch.setattr(setup_env, "torch_build", lambda: ("2.11.0+cu130", "13.0"))
    monkeypatch.setenv("MMCV_CUDA", choice)
    assert setup_env.cuda_archs() == archs


def activate(trial: Trial, torch: str) -> None:
    """Makes an active environment that has a torch."""
    trial.make_venv()
    trial.add("python", f'exec "{trial.venv}/bin/python" "$@"')
    info = trial.site / f"torch-{torch}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")


def test_no_venv_keeps_what_satisfies_setup_py(trial):
    activate(trial, "2.6.0")
    assert trial.run("--no-venv", TORCH="2.6.0").returncode == 0
    call = next(call for call in trial.calls() if "-r" in call)
    kept, added = call[-2:]
    assert "torch==2.6.0" in kept
    assert "mmdet==3.3.0" in added and "torch==2.11.0" not in added


def test_no_venv_replaces_what_is_too_old(trial):
    activate(trial, "1.13.0")
    assert trial.run("--no-venv").returncode == 0
    kept, added = next(call for call in trial.calls() if "-r" in call)[-2:]
    assert "torch==2.11.0" in added and not any(line.startswith("torch==") for line in kept)


def foreign_mmcv(trial):
    """An mmcv that the set-up has not built; its ``ops`` are the test's."""
    info = trial.site / "mmcv-2.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0\n")
    (trial.site / "mmcv").mkdir()
    (trial.site / "mmcv" / "__init__.py").write_text("")


def test_no_venv_keeps_an_mmcv_that_loads(trial):
    activate(trial, "2.6.0")
    foreign_mmcv(trial)
    (trial.site / "mmcv" / "ops.py").write_text("")
    assert trial.run("--no-venv", TORCH="2.6.0").returncode == 0
    assert trial.builds() == 0
    (trial.site / "mmcv" / "ops.py").write_text("raise ImportError('undefined symbol')")
    (trial.site / "torch" / "version.py").write_text("__version__ = '2.5.0'; cuda = None")
    assert trial.run("--no-venv", TORCH="2.5.0").returncode == 0
    assert trial.builds() == 1


def test_no_venv_builds_the_cuda_operators_that_are_asked_for(trial):
    activate(trial, "2.6.0")
    foreign_mmcv(trial)
    settings = dict(TORCH="2.6.0", MMCV_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    for version, builds in (("13.0", 0), ("not available", 1)):
        (trial.site / "mmcv" / "ops.py").write_text(f"def get_compiling_cuda_version(): return {version!r}")
        trial.site.parents[2].joinpath("mmdet_lors.stamp").unlink(missing_ok=True)
        assert trial.run("--no-venv", **settings).returncode == 0
        assert trial.builds() == builds


def requirements(python: str) -> dict[str, Requirement]:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    wanted = [Requirement(line) for line in lines]
    return {r.name: r for r in wanted if r.marker is None or r.marker.evaluate({"python_version": python})}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_pins_lie_within_the_bounds_of_setup_py(setup_env, python):
    pins = requirements(python)
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in pins.values())
    for bound in map(Requirement, setup_env.bounds() + setup_env.BUILD_TOOLS):
        [pin] = pins[bound.name].specifier
        assert bound.specifier.contains(pin.version), bound


def test_version_is_the_package_s(monkeypatch):
    command = [sys.executable, "setup.py", "--version"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    module = ast.parse((ROOT / "mmdet_lors" / "__init__.py").read_text())
    [version] = [n.value.value for n in module.body if isinstance(n, ast.Assign) and n.targets[0].id == "__version__"]
    assert answer.stdout.strip().splitlines()[-1] == version


def test_run_tests_passes_arguments_on(trial):
    python = trial.add("fake-python", 'echo "$@"')
    (trial.root / "tools" / "setup_env.sh").write_text(f'echo "setup got: $*" >&2; echo "{python}"\n')
    answer = trial.run("--no-venv", "-k", "a b", "tests/test_x.py", script="tools/run_tests.sh")
    assert answer.stdout == "-m pytest -k a b tests/test_x.py\n"
    assert answer.stderr == "setup got: --print-python --no-venv\n"
    everything = "-m pytest -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder tests"
    assert trial.run(script="tools/run_tests.sh").stdout == f"{everything}\n"
    assert trial.run("--every-config", script="tools/run_tests.sh").stdout == f"{everything} --every-config\n"


@pytest.mark.parametrize(("broken", "code"), [("nothing", 0), ("pytest", 1), ("check", 1), ("format", 1), ("mypy", 1)])
def test_ci_fails_when_a_check_fails(trial, broken, code):
    python = trial.add("fake-python", f'[[ "$*" != *"{broken}"* || "$*" == *"format --check"* && {broken} == check ]]')
    (trial.root / "tools" / "setup_env.sh").write_text(f'echo "{python}"\n')
    assert trial.run(script=".ci/run").returncode == code


@pytest.mark.parametrize("script", ["tools/setup_env.sh", "tools/run_tests.sh"])
def test_help_says_how_to_use_it(trial, script):
    answer = trial.run("--help", script=script)
    assert answer.returncode == 0
    assert f"Usage: bash {script}" in answer.stdout and "set -euo" not in answer.stdout
    assert not os.path.exists(trial.venv)
