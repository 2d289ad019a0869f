"""What the studies on embedded data share: runs of the tools, and the machine that they ran on."""

import os
import platform
import subprocess
import sys
from pathlib import Path

from mmdet_lors.errors import UserError

ROOT = Path(__file__).parents[2]


def call(*command: str, log: Path) -> None:
    """Run one of the tools with one thread; what it prints goes to the log.

    Raises:
        UserError: it failed; names the log.
    """
    env = dict(os.environ, OMP_NUM_THREADS="1")
    with log.open("a") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"{' '.join(command[:2])} ended with exit status {done.returncode}; see {log}")


def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
