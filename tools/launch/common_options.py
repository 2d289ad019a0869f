"""Options that train.py and test.py have in common."""

import argparse

from mmengine.config import DictAction


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
