"""How train.py, test.py and infer.py start: common options, and what a process is told before it imports torch."""

import argparse
import ctypes
import os

from mmengine.config import DictAction

SPIN_COUNT = 1000
"""How often a waiting thread looks for work before it gives its core to others. OpenMP's own choice, 300,000 times,
takes the core from every other process meanwhile (docs/speed.md)."""


def prepare_process() -> None:
    """Settings of OpenMP and of the allocator; those in the environment have precedence."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    keep_memory()


def keep_memory() -> None:
    """Let glibc keep freed memory for the next iteration, which needs as much again.

    It would give large blocks back to the system, which clears every page of them when they are asked for again.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another libc
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""As in glibc's malloc.h."""


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
