"""What the set-up promises, with a uv that installs nothing: no network, no compiler, seconds."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FILES = ["tools/setup_env.sh", "tools/run_tests.sh", ".ci/run", "requirements.txt", "setup.py"]
SYSTEM = "bash cat dirname find flock grep head id mkdir nproc paste sed sha256sum sort tail tee"

# Writes down how it was called, and leaves in site-packages what the set-up looks at.
FAKE_UV = """
import json, os, pathlib, subprocess, sys
arguments = [argument for argument in sys.argv[1:] if argument != "-v"]
names = ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "UV_INDEX", "UV_FIND_LINKS", "UV_COMPILE_BYTECODE", "CXX")
settings = {name: os.environ.get(name) for name in names}
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([arguments, settings]), file=calls)
when, _, message = os.environ.get("FAIL", "").partition("|")
if when and any(when in argument for argument in arguments) and "--offline" not in arguments:
    sys.exit(message)
if arguments[0] == "venv":
    make = [os.environ["REAL_PYTHON"], "-m", "venv", "--clear", "--without-pip", arguments[-1]]
    sys.exit(subprocess.run(make).returncode)

def add(name, text="", ops=None):
    (site / name).mkdir(exist_ok=True)
    (site / name / "__init__.py").write_text(text)
    if ops is not None:
        (site / name / "ops.py").write_text(ops)

python = arguments[arguments.index("--python") + 1]
show = [python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]
site = pathlib.Path(subprocess.run(show, capture_output=True, text=True).stdout.strip())
if "--override" in arguments:
    for name in ("torch", "mmdet"):
        add(name)
    add("cv2", os.environ.get("CV2", ""))
    (site / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\\ncuda: Optional[str] = '13.0'\\n")
if arguments[-1].startswith("mmcv=="):
    built = pathlib.Path(arguments[arguments.index("--cache-dir") + 1])
    if "--offline" in arguments and not built.is_dir():
        sys.exit("error: not in the cache")
    built.mkdir(exist_ok=True)
    source = built / "sdists/mmcv/2.1.0/setup.py"
    if "SOURCE" in os.environ and not source.is_file():
        source.parent.mkdir(parents=True)
        source.write_text(os.environ["SOURCE"])
        sys.exit("KeyError: '__version__'")
    source.parent.mkdir(parents=True, exist_ok=True)
    (source.parent / "mmcv.whl").touch()
    add("mmcv", "__version__ = '2.1.0'", ops="")
    (site / "mmcv-2.1.0.dist-info").mkdir(exist_ok=True)
    (site / "mmcv-2.1.0.dist-info" / "RECORD").write_text(built.name)
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
        for name in SYSTEM.split():
            (self.bin / name).symlink_to(shutil.which(name))
        (folder / "uv.py").write_text(FAKE_UV)
        self.add("uv", f'exec "{sys.executable}" "{folder / "uv.py"}" "$@"')
        self.add("c++", "")
        self.site = self.venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"

    def add(self, name: str, script: str) -> Path:
        """Puts an executable on PATH."""
        file = self.bin / name
        file.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        file.chmod(0o755)
        return file

    def run(self, *arguments: str, script: str = "tools/setup_env.sh", **settings: str):
        env = {
            "PATH": str(self.bin),
            "HOME": str(self.root.parent),
            "MMDET_LORS_CACHE": str(self.cache),
            "CALLS": str(self.calls_file),
            "REAL_PYTHON": sys.executable,
            "CUDA_HOME": "/nonexistent",
            **settings,
        }
        self.calls_file.write_text("")
        command = ["bash", str(self.root / script), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def calls(self) -> list[tuple[list[str], dict[str, str | None]]]:
        """How uv was called in the last run, each call with its settings."""
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def installs(self) -> list[list[str]]:
        """The calls that installed all but mmcv."""
        return [call for call, _ in self.calls() if "--override" in call]

    def builds(self) -> list[dict[str, str | None]]:
        """The settings of the calls that built mmcv."""
        return [how for call, how in self.calls() if call[-1].startswith("mmcv==") and "--offline" not in call]

    def built(self) -> list[str]:
        return sorted(folder.name for folder in self.cache.glob("mmcv-*"))


@pytest.fixture
def trial(tmp_path):
    return Trial(tmp_path)


def fails_with_one_line(answer, text: str) -> bool:
    lines = answer.stderr.splitlines()
    return answer.returncode == 1 and len(lines) == 1 and lines[0].startswith("setup: ") and text in lines[0]


def test_unknown_option_is_named(trial):
    assert fails_with_one_line(trial.run("--novenv"), "--novenv is not an option, see --help")


def test_missing_compiler_stops_before_anything_is_written(trial):
    (trial.bin / "c++").unlink()
    assert fails_with_one_line(trial.run(), "no C++ compiler (c++), mmcv cannot be built: apt-get install g++")
    assert not trial.venv.exists() and not trial.cache.exists()


@pytest.mark.parametrize(
    ("what", "output", "line"),
    [
        (
            "--override",
            "Resolving\nerror: Request failed after 3 retries\n  cause: Failed to fetch: https://x/torch/\n  cause: d",
            "Request failed after 3 retries: Failed to fetch: https://x/torch/",
        ),
        (
            "--override",
            "error: No solution found\n  cause: Because a was not found",
            "No solution found: Because a was",
        ),
        ("--override", "error: The interpreter at /usr is externally managed", "/usr is externally managed"),
        ("mmcv==", "write: No space left on device (os error 28)\nerror: failed", "No space left on device"),
        (
            "mmcv==",
            "c++: fatal error: Killed signal terminated program\nerror: failed",
            "out of memory, try MAX_JOBS=1",
        ),
        (
            "mmcv==",
            "/a/b/nms.cpp:3:10: fatal error: x.h: No such file\nerror: failed",
            "nms.cpp:3:10: fatal error: x.h: ",
        ),
        ("mmcv==", "something new", "something new"),
    ],
)
def test_failures_are_explained_in_one_line(trial, what, output, line):
    answer = trial.run(FAIL=f"{what}|{output}")
    assert answer.returncode == 1
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("setup: ") and line in last
    assert output in Path(re.search(r"\(log: (.*)\)$", last)[1]).read_text()
    assert trial.built() == [] and not (trial.site / "mmdet_lors.stamp").exists()
    assert trial.run().returncode == 0, "the next run goes on"


def test_long_steps_show_progress(trial):
    output = "Downloading torch (506.1MiB)\nDEBUG [9/58] c++ a\nDEBUG [10/58] c++ b\n"
    answer = trial.run(FAIL=f"mmcv==|{output}")
    assert "setup:   downloading torch (506.1MiB)\nsetup:   10/58 files compiled\n" in answer.stderr
    assert "9/58" not in answer.stderr


def test_second_run_does_nothing(trial):
    answer = trial.run()
    assert answer.returncode == 0, answer.stderr
    assert len(trial.builds()) == 1
    answer = trial.run()
    assert answer.returncode == 0
    assert answer.stderr == f"setup: {trial.venv}/bin/python is up to date\n"
    assert trial.calls() == []


def test_print_python_prints_only_the_path(trial):
    assert trial.run("--print-python").stdout == f"{trial.venv}/bin/python\n"
    assert trial.run("--print-python").stdout == f"{trial.venv}/bin/python\n"
    assert trial.run().stdout == ""


def test_changed_torch_gets_its_own_mmcv_and_stays(trial):
    trial.run()
    (trial.site / "torch" / "version.py").write_text("__version__ = '2.12.0+cpu'\ncuda = None\n")
    assert trial.run().returncode == 0
    assert len(trial.builds()) == 1 and not trial.installs()
    assert [re.search("torch-(.*)-cpython-3", name)[1] for name in trial.built()] == ["2.11.0+cu130", "2.12.0+cpu"]
    assert (trial.site / "mmcv-2.1.0.dist-info" / "RECORD").read_text().startswith("mmcv-2.1.0-torch-2.12.0+cpu-")


def test_other_mmcv_is_replaced(trial):
    trial.run()
    (trial.site / "mmcv-2.1.0.dist-info" / "RECORD").write_text("of someone else")
    assert trial.run().returncode == 0
    assert (trial.site / "mmcv-2.1.0.dist-info" / "RECORD").read_text() == trial.built()[0]
    assert not trial.builds()


def test_changed_requirements_are_installed(trial):
    trial.run()
    with (trial.root / "requirements.txt").open("a") as file:
        file.write("einops==0.8.1\n")
    assert trial.run().returncode == 0
    [call] = trial.installs()
    assert call[-2:] == ["-r", str(trial.root / "requirements.txt")]
    assert not trial.builds()


def test_built_mmcv_serves_the_next_environment(trial):
    trial.run()
    shutil.rmtree(trial.venv)
    assert trial.run().returncode == 0
    assert not trial.builds()


def test_opencv_without_a_display_is_replaced(trial):
    text = "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    assert trial.run(CV2=text).returncode == 0
    assert [call[-1] for call, _ in trial.calls()][-1] == "opencv-python-headless"


def test_a_build_that_was_interrupted_is_not_silent(trial):
    """What uv keeps of it is enough for uv to go on without the network, and without a word."""
    trial.run()
    shutil.rmtree(trial.venv)
    next(trial.cache.rglob("*.whl")).unlink()
    assert "[3/4] mmcv==2.1.0 from source" in trial.run().stderr
    assert len(trial.builds()) == 1


def test_mmcv_s_setup_is_mended_for_python_3_13(trial):
    """exec leaves no names in locals() there: https://docs.python.org/3/whatsnew/3.13.html (PEP 667)."""
    script = trial.root / "tools/setup_env.sh"
    script.write_text(script.read_text().replace("sys.implementation.cache_tag", '"cpython-313"'))
    source = "def version():\n    exec(compile(text, 'version.py', 'exec'))\n    return locals()['__version__']\n"
    assert trial.run(SOURCE=source).returncode == 0
    found = [("--offline" in call, how["CXX"]) for call, how in trial.calls() if call[-1].startswith("mmcv==")]
    assert found == [(False, "false"), (True, None)]
    mended = next(trial.cache.rglob("setup.py")).read_text()
    names = {"text": "__version__ = '2.1.0'"}
    exec(mended, names)
    assert names["version"]() == "2.1.0" and "locals" not in mended


def test_venv_that_does_not_run_is_made_anew(trial):
    (trial.venv / "bin").mkdir(parents=True)
    (trial.venv / "bin" / "python").symlink_to("/nonexistent")
    assert trial.run(PYTHON="3.12").returncode == 0
    assert trial.calls()[0][0] == ["venv", "--seed", "--clear", "--python", "3.12", str(trial.venv)]


@pytest.mark.parametrize(
    ("gpus", "nvcc", "choice", "archs"),
    [
        ("", "13", "", None),
        ("9.0", "13", "", "9.0"),
        ("9.0\n8.0\n9.0", "13", "", "8.0;9.0"),
        ("9.0", "12", "", None),
        ("9.0", "", "", None),
        ("9.0", "13", "0", None),
        ("9.0", "", "1", "9.0"),
    ],
)
def test_cuda_operators_need_a_gpu_and_the_nvcc_of_torch(trial, gpus, nvcc, choice, archs):
    if gpus:
        trial.add("nvidia-smi", f"echo '{gpus}'")
    if nvcc:
        trial.add("nvcc", f"echo 'Cuda compilation tools, release {nvcc}.0, V{nvcc}.0.1'")
    answer = trial.run(MMCV_CUDA=choice)
    assert answer.returncode == 0, answer.stderr
    [how] = trial.builds()
    assert (how["FORCE_CUDA"], how["TORCH_CUDA_ARCH_LIST"]) == ("1" if archs else None, archs)
    [name] = trial.built()
    assert name.partition("-cuda-")[2] == (archs or "").replace(";", "-")
    assert trial.run(MMCV_CUDA=choice).stderr.endswith("is up to date\n")


@pytest.mark.parametrize(("chosen", "told"), [({}, "1"), ({"UV_COMPILE_BYTECODE": "0"}, "0")])
def test_packages_are_compiled_when_they_are_installed(trial, chosen, told):
    trial.run(**chosen)
    assert [how["UV_COMPILE_BYTECODE"] for _, how in trial.calls()] == [told] * 3


def test_uv_is_installed_where_there_is_none_and_told_what_pip_knows(trial):
    uv = trial.bin / "uv"
    uv.rename(trial.root / "uv")
    pip = trial.root / "pip"
    pip.write_text(
        f"""#!{shutil.which("bash")}
        case "$*" in
        "config list") echo "global.extra-index-url='file:///a file:///b'"; echo ":env:.find-links='/wheels'" ;;
        "install uv") ln -s "{trial.root / "uv"}" "${{0%/*}}/uv" ;;
        esac"""
    )
    pip.chmod(0o755)
    (trial.bin / "ln").symlink_to(shutil.which("ln"))
    trial.add("python3", f'mkdir -p "$4/bin" && ln -s "{pip}" "$4/bin/pip"')
    answer = trial.run()
    assert answer.returncode == 0, answer.stderr
    [how, *_] = [how for _, how in trial.calls()]
    assert (how["UV_INDEX"], how["UV_FIND_LINKS"]) == ("file:///a file:///b", "/wheels")


def activate(trial: Trial, ops: str) -> None:
    """Makes an active environment that has a torch, and an mmcv that the set-up has not built, with these operators."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", trial.venv], check=True)
    trial.add("python", f'exec "{trial.venv}/bin/python" "$@"')
    for name in ("torch", "mmcv", "mmcv-2.1.0.dist-info"):
        (trial.site / name).mkdir()
    (trial.site / "torch" / "version.py").write_text("__version__ = '2.6.0'\ncuda = None\n")
    (trial.site / "mmcv" / "__init__.py").write_text("__version__ = '2.1.0'")
    (trial.site / "mmcv" / "ops.py").write_text(ops)


@pytest.mark.parametrize(("ops", "builds"), [("", 0), ("raise ImportError('undefined symbol')", 1)])
def test_no_venv_keeps_what_is_there_and_an_mmcv_that_loads(trial, ops, builds):
    activate(trial, ops)
    answer = trial.run("--no-venv")
    assert answer.returncode == 0, answer.stderr
    [call] = trial.installs()
    assert call[-5:-3] == ["-e", f"{trial.root}[tests]"]
    assert len(trial.builds()) == builds


@pytest.mark.parametrize(("cuda", "builds"), [("13.0", 0), ("not available", 1)])
def test_no_venv_builds_the_cuda_operators_that_are_asked_for(trial, cuda, builds):
    activate(trial, f"def get_compiling_cuda_version(): return {cuda!r}")
    answer = trial.run("--no-venv", MMCV_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert answer.returncode == 0, answer.stderr
    assert len(trial.builds()) == builds


def requirements(python: str) -> dict[str, Requirement]:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    wanted = [Requirement(line) for line in lines]
    return {r.name: r for r in wanted if r.marker is None or r.marker.evaluate({"python_version": python})}


def bounds() -> list[str]:
    """What setup.py requires, for the tests included."""
    nodes = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    given = {node.arg: node.value for node in nodes if isinstance(node, ast.keyword)}
    return ast.literal_eval(given["install_requires"]) + ast.literal_eval(given["extras_require"])["tests"]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_lie_within_the_bounds_of_setup_py(python):
    pins = requirements(python)
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in pins.values())
    for bound in map(Requirement, [*bounds(), "setuptools>=64,<81", "wheel", "ninja"]):
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
    everything = "-m pytest -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder --durations=20 tests"
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
