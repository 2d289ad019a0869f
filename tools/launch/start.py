"""How train.py, test.py and infer.py start: common options, and what a process is told before it imports torch."""

import argparse
import os

from mmengine.config import DictAction

SPIN_COUNT = 10000
"""How often a waiting thread looks for work before it gives its core to others: about half a millisecond. OpenMP's own
choice, 300,000 times, takes the core from every other process meanwhile; with 1,000 times threads sleep between a small
model's operations (docs/speed.md)."""


PRIMITIVES = 256
"""How many convolutions oneDNN keeps prepared on a CPU, each for one size of image. Its own choice is 1024, of which
one size takes fifty to a hundred; images of many sizes fill gigabytes with the rest."""


def prepare_process() -> None:
    """How OpenMP's threads wait and what oneDNN keeps, unless the environment says."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
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
