"""Time and memory of training under several environments, in turn: alone, and beside a process with two busy threads.

An environment is NAME=VALUE[,NAME=VALUE...], or "" for tools/train.py's own choice. Every run is a process of its own;
a ratio is the median over rounds of the ratio within the round. An iteration's time is the median of the log's lines
but the first.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

INTERVAL = 10
"""Iterations in a line of the log."""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", help="config file")
    parser.add_argument("--environments", nargs="+", default=[""], metavar="A=1,B=2", help="the first is the base")
    parser.add_argument("--beside", nargs="+", choices=["nothing", "busy"], default=["nothing", "busy"])
    parser.add_argument("--processes", type=int, default=1, help="of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--lines", type=int, default=6, help=f"of {INTERVAL} iterations each (default: %(default)s)")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="append the tables to this page")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import torch

from mmdet_lors.analysis.study import ROOT, machine, read, table
from mmdet_lors.analysis.timing import interleaved, ratio
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

# It ends with this process, however that ends.
BUSY = "import os, torch\nparent, a = os.getppid(), torch.rand(1500, 1500)\nwhile os.getppid() == parent: a @ a"


def one_run(config: str, environment: dict[str, str], processes: int, lines: int, options: list[str]) -> dict:
    """Train for ``lines`` lines of the log; returns 'seconds' of an iteration, and 'peak', GB, of the largest process.

    Raises:
        UserError: the run failed.
    """
    images = INTERVAL * lines * processes * read(config).train_dataloader.batch_size
    with tempfile.TemporaryDirectory() as work:
        script = ["bash", "tools/dist_train.sh", config, str(processes)] if processes > 1 else []
        command = script or [sys.executable, "tools/train.py", config]
        settings = [
            f"default_hooks.logger.interval={INTERVAL}",
            "train_cfg.max_epochs=1",
            "train_cfg.val_interval=1000",
            f"train_dataloader.dataset.indices={images}",
            *options,
        ]
        child = subprocess.Popen(
            [*command, "--work-dir", work, "--cfg-options", *settings],
            cwd=ROOT,
            env=os.environ | dict(PYTHON=sys.executable) | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise UserError(f"{shlex.join(command)} failed: {errors.strip().splitlines()[-1]}")
        log = next(Path(work).glob("*/vis_data/scalars.json")).read_text().splitlines()
        times = [row["time"] for row in map(json.loads, log) if "time" in row]
    return dict(seconds=median(times[1:]), peak=usage.ru_maxrss * 1024 / 1e9)


def pairs(text: str) -> dict[str, str]:
    """'A=1,B=2' as a dict."""
    return dict(pair.split("=", 1) for pair in text.split(",")) if text else {}


def measure(args: argparse.Namespace, beside: bool) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of an iteration and peak GB of every environment, a number per round."""
    peaks: dict[str, list[float]] = {name: [] for name in args.environments}

    def once(name: str) -> float:
        found = one_run(args.config, pairs(name), args.processes, args.lines, args.cfg_options)
        peaks[name].append(found["peak"])
        return found["seconds"]

    two_threads = os.environ | dict(OMP_NUM_THREADS="2")
    busy = subprocess.Popen([sys.executable, "-c", BUSY], env=two_threads) if beside else None
    try:
        return interleaved({name: partial(once, name) for name in args.environments}, args.rounds, 0, True), peaks
    finally:
        if busy:
            busy.kill()


def check(args: argparse.Namespace) -> None:
    """Refuse what argparse cannot know.

    Raises:
        UserError: names the option.
    """
    if min(args.processes, args.rounds) < 1 or args.lines < 2:
        raise UserError("--processes and --rounds must be 1 or more, --lines 2 or more")
    if bad := [text for text in args.environments if text and not all("=" in pair for pair in text.split(","))]:
        raise UserError(f"--environments {bad[0]}: must be NAME=VALUE, several separated by commas")


def main() -> None:
    """Measure, print, and write what was asked for."""
    args = parse_args()
    check(args)
    print(
        lines
        := f"`python {shlex.join(['tools/analysis_tools/benchmark_training.py', *sys.argv[1:]])}` on {date.today()}: "
        f"{machine()}, torch {torch.__version__}, Python {platform.python_version()}, {args.rounds} rounds."
    )
    for beside in args.beside:
        times, peaks = measure(args, beside == "busy")
        base = args.environments[0]
        rows = [
            [name or "(its own)", f"{median(times[name]):.3f} [{min(times[name]):.3f}-{max(times[name]):.3f}]",
             f"{ratio(times, name, base):.2f}", f"{median(peaks[name]):.2f}", f"{ratio(peaks, name, base):.2f}"]
            for name in args.environments
        ]  # fmt: skip
        what = "alone" if beside == "nothing" else "beside two busy threads"
        found = table([f"{what}: environment", "s / iteration", "ratio", "peak, GB", "ratio"], rows)
        print("\n".join(["", *found]), flush=True)
        lines = "\n".join([lines, "", *found])
    if args.out:
        before = args.out.read_text() + "\n" if args.out.is_file() else "# Training under several environments\n\n"
        args.out.write_text(before + lines + "\n")


if __name__ == "__main__":
    run(main)
