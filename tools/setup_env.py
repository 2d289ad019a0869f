"""The set-up behind tools/setup_env.sh, which documents it and chooses the Python that this runs in."""

import argparse
import ast
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata as metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("MMDET_LORS_VENV") or ROOT / ".venv").absolute()
USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CACHE = Path(os.environ.get("MMDET_LORS_CACHE") or USER_CACHE / "mmdet_lors").absolute()
WORK = CACHE / "work"
STAMP = Path(sys.prefix) / "mmdet_lors.stamp"
DISK_GB = float(os.environ.get("MMDET_LORS_DISK_GB") or 12)
CORE_MINUTES = 11  # for mmcv 2.1.0 without CUDA, at -O1
BUILD_TOOLS = ["setuptools>=64,<81", "wheel", "ninja"]
PULSE_SECONDS = 30


class SetupError(Exception):
    """Ends the set-up; its message is the one line that the user reads."""


def say(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


@contextmanager
def step(number: int, what: str) -> Iterator[None]:
    start = time.monotonic()
    say(f"[{number}/4] {what}")
    yield
    say(f"[{number}/4] done in {duration(time.monotonic() - start)}")


def pin(name: str) -> str:
    """The version that requirements.txt pins for a package that has the same pin on every Python."""
    return re.search(rf"^{name}==(\S+)", (ROOT / "requirements.txt").read_text(), re.M).group(1)


def inputs() -> str:
    """Changes when the packages have to be installed again."""
    files = [ROOT / "requirements.txt", ROOT / "setup.py"]
    return hashlib.sha256(b"\0".join([bytes(ROOT), *(f.read_bytes() for f in files)])).hexdigest()[:16]


def torch_build() -> tuple[str, str]:
    """Version and CUDA version of the installed torch, "" for none. Importing torch would take seconds."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", ""
    build = runpy.run_path(Path(spec.origin).with_name("version.py"))
    return build["__version__"], build.get("cuda") or ""


def installed(name: str) -> str:
    """Version of an installed package, "" for none."""
    importlib.invalidate_caches()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def mmcv_key() -> str:
    """Which of our wheels the installed mmcv came from; "foreign <version>" for another one, "" for none."""
    if not installed("mmcv"):
        return ""
    url = json.loads(metadata.distribution("mmcv").read_text("direct_url.json") or "{}").get("url", "")
    folder = PurePosixPath(unquote(url)).parent.name
    return folder if folder.startswith("mmcv-") else f"foreign {installed('mmcv')}"


@functools.cache
def gpus() -> list[str]:
    """Compute capabilities of the visible GPUs."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return sorted(set(re.findall(r"^\d+\.\d+$", answer.stdout, re.M)))


def nvcc_major() -> str:
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ['PATH']}")
    if not nvcc:
        return ""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return "".join(re.findall(r"release (\d+)\.", answer)[:1])


def cuda_archs() -> str:
    """What to build mmcv's CUDA operators for, like 9.0 or 8.0;9.0; "" for none."""
    choice = os.environ.get("MMCV_CUDA", "")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(gpus())
    if choice == "1" and not archs:
        raise SetupError("MMCV_CUDA=1 without a GPU needs TORCH_CUDA_ARCH_LIST, for example 9.0")
    # torch refuses to build with another major version of CUDA than its own.
    can_build = archs and gpus() and torch_build()[1] and nvcc_major() == torch_build()[1].split(".")[0]
    return archs if choice == "1" or (choice == "" and can_build) else ""


def wheel_key(torch: str, archs: str) -> str:
    """Names a wheel by all that it was built for; pip's cache goes by mmcv's version, whatever the torch."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
    kind = "cuda-" + re.sub(r"[^\w.]+", "-", archs) if archs else "cpu"
    return f"mmcv-{pin('mmcv')}-torch-{torch}-{python}-{kind}"


def state() -> dict[str, str]:
    """What the stamp records: equal means that nothing changed since the last set-up."""
    return {"inputs": inputs(), "torch": torch_build()[0], "mmcv": mmcv_key(), "archs": cuda_archs()}


def check_compiler() -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ["c++", "g++"]), None)
    if not compiler or not shutil.which(compiler.split()[0]):
        raise SetupError(f"no C++ compiler ({compiler or 'c++, g++'}), mmcv cannot be built: apt-get install g++")
    if not shutil.which("c++"):
        os.environ["CXX"] = compiler
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        name = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise SetupError(f"no Python.h for {sys.executable}, mmcv cannot be built: apt-get install {name}")


def check_disk() -> None:
    for folder in (VENV, CACHE):
        there = next(f for f in (folder, *folder.parents) if f.exists())
        free = shutil.disk_usage(there).free / 1e9
        if free < DISK_GB:
            raise SetupError(
                f"not enough disk: {free:.1f} GB free at {there}, {DISK_GB:g} GB needed "
                "(MMDET_LORS_DISK_GB sets another limit)"
            )


def pulse(line: str) -> str:
    """What a line of pip's output says about how far pip is, "" for nothing."""
    if found := re.match(r"\s*\[(\d+)/(\d+)\] ", line):
        return f"{found[1]} of {found[2]} files compiled"
    if found := re.match(r"\s*Downloading (?:.*/)?(\S+) (\(.*\))", line):
        return f"downloading {found[1]} {found[2]}"
    return "unpacking" if line.startswith("Installing collected") else ""


def explain(what: str, output: str, log: Path) -> str:
    """The one line for what pip printed before it failed."""
    missing = re.search(r"^ERROR: No matching distribution found for (.+)", output, re.M)
    compile_error = re.search(r"^.*?([^/\n]*: (?:fatal )?error: .*)", output, re.M)
    network = "name resolution|NameResolution|NewConnection|unreachable|Connection |ProxyError|timed out|SSLError"
    if "No space left on device" in output:
        return f"no space left on the disk while {what} (log: {log})"
    if "externally-managed-environment" in output:
        return f"{sys.executable} is the system's, closed to pip: activate an environment or drop --no-venv"
    if re.search("Killed signal|bad_alloc|out of memory", output):
        return f"out of memory while {what}: try MAX_JOBS=1 (log: {log})"
    if compile_error:
        return f"{what} failed: {compile_error[1]} (log: {log})"
    if re.search(network, output):
        package = missing or re.search(r"Collecting (\S+)(?![\s\S]*Collecting )", output)
        return f"no network: pip could not download {package[1] if package else 'anything'} (log: {log})"
    if missing:
        return f"pip finds no {missing[1]}: is the network, or the package index, there? (log: {log})"
    errors = re.findall(r"^\s*(?:ERROR|error): (.*)", output, re.M) or output.strip().splitlines() or ["no output"]
    return f"{what} failed: {errors[-1]} (log: {log})"


def pip(what: str, options: str, *paths: Path | str, **settings: str) -> None:
    """Runs pip with its output in a log, saying how far it is; `settings` go to its environment."""
    log = CACHE / "logs" / f"{what.replace(' ', '-')}.log"
    # torch calls ninja by name. Temporary files go to the disk that was checked: /tmp may be small.
    (WORK / "tmp").mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *options.split(), *paths],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "TMPDIR": str(WORK / "tmp"), **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        close_fds=False,
    )
    last = time.monotonic()
    try:
        with log.open("w") as copy:
            for line in process.stdout:
                copy.write(line)
                if (news := pulse(line)) and time.monotonic() - last >= PULSE_SECONDS:
                    say(f"      {news}")
                    last = time.monotonic()
        process.wait()
    finally:
        # Ends the compilers too when the set-up is interrupted.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if process.returncode:
        raise SetupError(explain(what, log.read_text(errors="replace"), log))


def import_error(code: str) -> str:
    """The last line that `code` fails with in a fresh interpreter, "" where it runs."""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CACHE)
    return (answer.stderr.strip().splitlines() or ["killed"])[-1] if answer.returncode else ""


def enter_venv(arguments: list[str]) -> NoReturn:
    """Makes .venv where there is none that works, and goes on in its Python."""
    python = VENV / "bin" / "python"
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    there = ""
    with suppress(OSError):
        there = subprocess.run([python, "-c", show], capture_output=True, text=True).stdout.strip()
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    if there and there != mine:
        raise SetupError(f"{VENV} has Python {there}, not {mine}: remove it, or choose its Python with PYTHON")
    os.environ["MMDET_LORS_STARTED"] = str(time.time())
    if not there:
        if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
            raise SetupError(f"{sys.executable} cannot make a venv: apt-get install python{mine}-venv")
        check_disk()
        if not list((CACHE / "wheels").glob(wheel_key(f"{pin('torch')}*", "").replace("-cpu", "-*"))):
            check_compiler()
        with step(1, f"{VENV} with Python {platform.python_version()}"):
            made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
            if made.returncode:
                raise SetupError(f"cannot make {VENV}: {(made.stderr or made.stdout).strip().splitlines()[-1]}")
    os.execv(python, [str(python), __file__, *arguments])


def lock() -> int:
    """Waits for another set-up of this user: they share the cache."""
    handle = os.open(CACHE / "lock", os.O_CREAT | os.O_RDWR)
    # A pip that outlives its killed set-up keeps the lock.
    os.set_inheritable(handle, True)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another set-up is running, waiting for it")
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def bounds() -> list[str]:
    """What setup.py requires, the tests' extra included."""
    nodes = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    given = {node.arg: node.value for node in nodes if isinstance(node, ast.keyword)}
    extras = ast.literal_eval(given["extras_require"])
    return ast.literal_eval(given["install_requires"]) + extras["tests"]


def satisfied(requirement: str) -> bool:
    from pip._vendor.packaging.requirements import Requirement

    wanted = Requirement(requirement)
    there = installed(wanted.name)
    return bool(there) and wanted.specifier.contains(there, prereleases=True)


def add_missing() -> None:
    """Adds what setup.py requires and the active environment lacks; what satisfies setup.py stays."""
    from pip._vendor.packaging.requirements import Requirement

    wanted = ["setuptools>=64", *(b for b in bounds() if Requirement(b).name != "mmcv")]
    missing = [b for b in wanted if not satisfied(b)]
    if not missing:
        return
    say(f"[2/4] missing, or too old: {', '.join(missing)}")
    kept = [Requirement(b).name for b in wanted if b not in missing]
    (WORK / "kept").write_text("".join(f"{name}=={installed(name)}\n" for name in kept))
    names = "|".join(Requirement(b).name for b in missing)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    (WORK / "pins").write_text("\n".join(line for line in lines if re.match(rf"(?i)({names})==", line)))
    try:
        pip("installing the tested versions", "install -c", WORK / "kept", "-r", WORK / "pins")
    except SetupError:
        # The tested versions need not go with what has to stay; anything that setup.py accepts will do.
        pip("installing what is missing", "install -c", WORK / "kept", *missing)


def install_pins() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    (WORK / "pins").write_text("\n".join(line for line in lines if not line.startswith("mmcv==")))
    pip("installing requirements.txt", "install -r", WORK / "pins")


def parallel_jobs() -> int:
    """One compiler per core, and per 2 GB of free memory."""
    free = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
    return max(1, min(len(os.sched_getaffinity(0)), int(free[1]) // 2_000_000))


def build_mmcv(key: str, torch: str, archs: str) -> None:
    """Builds mmcv's wheel into the cache."""
    check_compiler()
    jobs = int(os.environ.get("MAX_JOBS") or parallel_jobs())
    if gpus() and not archs:
        say("a GPU, but no nvcc for torch's CUDA (or MMCV_CUDA=0): mmcv's operators will run on the CPU only")
    kind = "CUDA operators too, up to half an hour" if archs else f"about {1 + CORE_MINUTES // jobs} minutes"
    with step(3, f"mmcv {pin('mmcv')} from source for torch {torch}: {kind} on {jobs} cores"):
        if tools := [tool for tool in BUILD_TOOLS if not satisfied(tool)]:
            pip("installing what builds mmcv", "install", *tools)
        flags = os.environ.get("CFLAGS", "-O1 -g0")
        settings = {"MMCV_WITH_OPS": "1", "MAX_JOBS": str(jobs), "CFLAGS": flags}
        if archs:
            settings |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": archs}
        else:
            # mmcv builds for CUDA wherever torch sees a GPU.
            settings |= {"FORCE_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}
        options = "-v --no-cache-dir --no-binary mmcv --no-build-isolation --no-deps"
        pip("building mmcv", f"wheel {options} mmcv=={pin('mmcv')} -w", WORK / "wheel", **settings)
        # Moved whole: an interrupted build leaves no half of a wheel in the cache.
        (CACHE / "wheels").mkdir(exist_ok=True)
        (WORK / "wheel").rename(CACHE / "wheels" / key)


def mmcv_stays(key: str, no_venv: bool) -> bool:
    if not no_venv or not mmcv_key().startswith("foreign"):
        return mmcv_key() == key
    bound = next(b for b in bounds() if b.startswith("mmcv"))
    wanted = "import mmcv.ops"
    if os.environ.get("MMCV_CUDA") == "1":
        wanted += "; assert mmcv.ops.get_compiling_cuda_version() != 'not available'"
    return satisfied(bound) and not import_error(wanted)


def install_mmcv(no_venv: bool) -> None:
    torch, archs = torch_build()[0], cuda_archs()
    key = wheel_key(torch, archs)
    if mmcv_stays(key, no_venv):
        return
    if mmcv_key():
        say(f"mmcv does not fit torch {torch} (it is {mmcv_key()})")
    if not list((CACHE / "wheels" / key).glob("*.whl")):
        build_mmcv(key, torch, archs)
    [wheel] = (CACHE / "wheels" / key).glob("*.whl")
    say(f"[3/4] installing {key}")
    pip("installing mmcv", "install --force-reinstall --no-deps --no-index", wheel)


def check_imports() -> None:
    error = import_error("import cv2")
    if "cannot open shared object file" in error:
        say(f"[4/4] opencv-python lacks a system library ({error.split(': ')[1]}): opencv-python-headless replaces it")
        headless = f"opencv-python-headless=={installed('opencv-python') or pin('opencv-python')}"
        pip("installing OpenCV", "install --force-reinstall --no-deps", headless)
        error = import_error("import cv2")
    if error := error or import_error("import mmcv.ops, mmdet"):
        raise SetupError(f"everything is installed, but importing mmdet fails: {error}")


def install(no_venv: bool) -> None:
    """Brings the environment that this runs in up to date."""
    if not torch_build()[0]:
        check_disk()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    try:
        if import_error("import pip._internal"):
            ensured = subprocess.run([sys.executable, "-m", "ensurepip", "--upgrade"], capture_output=True)
            if ensured.returncode:
                raise SetupError(f"{sys.executable} has no pip, and -m ensurepip fails: install pip first")
        # With unchanged inputs, a torch that the user chose stays: it gets its mmcv, and not the pin back.
        if last_stamp().get("inputs") != inputs():
            STAMP.unlink(missing_ok=True)
            what = "what setup.py requires" if no_venv else f"torch {pin('torch')} and the other packages"
            with step(2, f"{what}: up to 3 GB to download, about 2 minutes on a fast network"):
                (add_missing if no_venv else install_pins)()
        install_mmcv(no_venv)
        with step(4, "mmdet_lors, and a look whether mmdet imports"):
            pip("installing mmdet_lors", "install --no-build-isolation --no-deps -e", ROOT)
            check_imports()
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    with suppress(PermissionError):
        STAMP.write_text(json.dumps(state(), indent=1) + "\n")


def last_stamp() -> dict[str, str]:
    with suppress(OSError, ValueError):
        return json.loads(STAMP.read_text())
    return {}


def up_to_date(no_venv: bool) -> bool:
    now = state()
    if last_stamp() != now:
        return False
    foreign = no_venv and now["mmcv"].startswith("foreign")
    return foreign or now["mmcv"] == wheel_key(now["torch"], now["archs"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-venv", action="store_true")
    parser.add_argument("--print-python", action="store_true")
    options = parser.parse_args()
    started = float(os.environ.pop("MMDET_LORS_STARTED", 0))
    if not started and not options.no_venv and os.path.realpath(sys.prefix) != os.path.realpath(VENV):
        enter_venv(sys.argv[1:])
    started = started or time.time()
    where = sys.prefix if options.no_venv else VENV
    if up_to_date(options.no_venv):
        say(f"{where} is up to date")
    else:
        (CACHE / "logs").mkdir(parents=True, exist_ok=True)
        held = lock()
        if not up_to_date(options.no_venv):
            install(options.no_venv)
        os.close(held)
        say(f"done in {duration(time.time() - started)}: {where}")
    if options.print_python:
        print(sys.executable)


def stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except SetupError as error:
        say(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted: run it again to go on")
        sys.exit(130)
    except OSError as error:
        say(str(error))
        sys.exit(1)
