"""How train.py, test.py and infer.py start: common options, and what a process is told before it imports torch."""

import argparse
import os
import time
from pathlib import Path

from mmengine.config import DictAction

SPIN_COUNT = 10000
"""How often a waiting thread looks for work before it gives its core to others: about half a millisecond. OpenMP's own
choice, 300,000 times, takes the core from every other process meanwhile; with 1,000 times threads sleep between a small
model's operations (docs/speed.md). Beside other work they sleep at once."""

SYSTEM = Path("/proc/stat")
"""Where Linux says what each core has done since it started, see ``man proc_stat``."""

PRIMITIVES = 256
"""How many convolutions oneDNN keeps prepared on a CPU, each for one size of image. Its own choice is 1024, of which
one size takes fifty to a hundred; images of many sizes fill gigabytes with the rest."""


def cores_are_shared(seconds: float = 0.1) -> bool:
    """Whether other processes take more than a quarter of this one's cores, measured while it waits.

    False where the system does not say.
    """
    if not SYSTEM.is_file():
        return False
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}

    def ticks() -> list[int]:
        rows = [row.split() for row in SYSTEM.read_text().splitlines()]
        times = [list(map(int, row[1:9])) for row in rows if row[0] in cores]
        return [sum(map(sum, times)), sum(idle + disk for _, _, _, idle, disk, *_ in times)]

    before = ticks()
    time.sleep(seconds)
    passed, idle = (now - then for now, then in zip(ticks(), before, strict=True))
    return passed - idle > passed / 4


def prepare_process() -> None:
    """How OpenMP's threads wait and what oneDNN keeps, unless the environment says."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "0" if cores_are_shared() else str(SPIN_COUNT)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that training and testing have in common."""
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--work-dir", metavar="DIR", help="where logs and results go (default: work_dirs/<config name>)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="settings that override the config, e.g. model.decoder.lors.static.rank=4",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes were started; the launch scripts set it (default: %(default)s)",
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:N, mps or xpu (default: a GPU if mmengine finds one)"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
