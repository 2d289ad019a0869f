"""Shared by the studies on embedded data: runs of the tools, each done once and several at a time, and their tables."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TypeVar

from mmengine.config import Config

from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json

ROOT = Path(__file__).parents[2]
Run = TypeVar("Run")
_READING = Lock()
"""mmengine cannot read two configs at once."""


@cache
def read(config: str) -> Config:
    """A config below the project's folder, read once; do not change it."""
    with _READING:
        return Config.fromfile(ROOT / config)


def call(*command: str, log: Path, threads: int = 1) -> None:
    """Run one of the tools, and append its output to the log.

    Raises:
        UserError: it failed; names the log.
    """
    env = dict(os.environ, OMP_NUM_THREADS=str(threads))
    with log.open("a") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"{' '.join(command[:2])} ended with exit status {done.returncode}; see {log}")


def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []  # only Linux has it
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def once(folder: Path, work: Callable[[], dict]) -> dict:
    """This run's result, read from its folder's result.json if the run has finished before, else by running it."""
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    outcome = work()
    result.write_text(to_json(outcome) + "\n")
    return outcome


def train(config: str, folder: Path, options: Sequence[str], threads: int = 1) -> float:
    """Train into a folder.

    Args:
        config: its path below the project's folder.
        options: values of --cfg-options.
        threads: of the run.

    Returns:
        Wall-clock seconds, start and loading included.

    Raises:
        UserError: see :func:`call`.
    """
    begin = time.monotonic()
    call("tools/train.py", config, "--work-dir", str(folder), "--cfg-options", *options, log=folder / "log.txt",
         threads=threads)  # fmt: skip
    return time.monotonic() - begin


def evaluate(config: str, checkpoint: Path, folder: Path, options: Sequence[str] = ()) -> dict:
    """Evaluate a checkpoint; logs go to the folder.

    Returns:
        The evaluator's metrics.

    Raises:
        UserError: see :func:`call`.
    """
    metrics = folder / "metrics.json"
    arguments = [str(checkpoint), "--metrics", str(metrics), "--work-dir", str(folder / "test")]
    arguments += ["--cfg-options", *options] if options else []
    call("tools/test.py", config, *arguments, log=folder / "log.txt")
    return json.loads(metrics.read_text())


def last_epoch_only(epochs: int) -> list[str]:
    """--cfg-options that keep only the last epoch's checkpoint, and leave evaluation to :func:`evaluate`."""
    checkpoint = "default_hooks.checkpoint"
    return [f"train_cfg.val_interval={epochs + 1}", f"{checkpoint}.interval={epochs}", f"{checkpoint}.save_best=None"]


def side_by_side(task: Callable[[Run], dict], runs: Iterable[Run], jobs: int) -> Iterator[tuple[Run, dict]]:
    """Each run with its task's result, in the order of the runs, ``jobs`` of them at a time."""
    runs = list(runs)
    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(runs, pool.map(task, runs), strict=True)


def made_by(name: str, options: str, jobs: int) -> str:
    """The beginning of a page: the command, the day, the machine."""
    command = f"python tools/studies/{name}.py {options}"
    side = f"{jobs} runs side by side with one thread each"
    return f"Made by `{command}` on {date.today()}; {machine()}, {side}"


def link(config: str, root: str = "../") -> str:
    """A link to a config from a page in docs/, or from where the project's folder is ``root``."""
    return f"[{Path(config).stem}]({root}{config})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]
