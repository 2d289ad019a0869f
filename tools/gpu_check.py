"""Prove a card: does this project compute on it what it should, how fast, and what does it wait for?

Section by section, each with a line PASS, FAIL or SKIPPED and its figures. The page (--out) and the same as JSON beside
it are written after every section, so that nothing is lost. Needs no network and no data but what it makes.
"""

import argparse
import gc
import platform
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path

from device_checks import ROOT

SECTIONS = {
    "environment": (lambda: environment, 30),
    "golden": (lambda: golden, 60),
    "sampling": (lambda: sampling, 60),
    "precision": (lambda: precision, 30),
    "compile": (lambda: compiled, 90),
    "waits": (lambda: waits, 60),
    "speed": (lambda: speed, 150),
    "matrix rate": (lambda: matrix_rate, 30),
    "profile": (lambda: profile, 40),
    "launch": (lambda: launch, 60),
    "stop and resume": (lambda: stop_and_resume, 60),
    "loss scaler": (lambda: loss_scaler, 60),
    "digits": (lambda: digits, 1e9),
}
"""What is checked, by a function that is imported only below, and the seconds that it may take at most."""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="(default: cuda where there is one)")
    parser.add_argument("--minutes", type=float, default=8, help="to spend at most, about (default: %(default)s)")
    page = ROOT / "docs/measured/gpu.md"
    parser.add_argument("--out", type=Path, default=page, metavar="FILE.md", help="(default: docs/measured/gpu.md)")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME",
                        help=f"of: {', '.join(SECTIONS)} (default: all)")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import torch
from device_checks.check import Machine, Sheet, Skipped, TimeUp
from device_checks.correctness import compiled, golden, precision, sampling
from device_checks.environment import environment
from device_checks.runs import digits, launch, loss_scaler, stop_and_resume
from device_checks.speed import matrix_rate, profile, speed, waits
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger

from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.analysis.timing import hardware
from mmdet_lors.engine.launch import run
from mmdet_lors.engine.machine import usable
from mmdet_lors.errors import UserError, first_line
from mmdet_lors.valid_json import to_json

GRACE = 5
"""Seconds more for a section that watches the clock, to end by itself."""


def conduct(name: str, machine: Machine, sheet: Sheet) -> None:
    """Run one section; whatever happens in it is on its sheet."""
    section, most = SECTIONS[name]
    begin = time.monotonic()
    machine.until = begin + most
    if machine.left() < 1:
        sheet.status, sheet.why = "SKIPPED", "no time left"
        return
    alarm = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")

    def time_up(*_) -> None:
        raise TimeUp

    try:
        if alarm:
            before = signal.signal(signal.SIGALRM, time_up)
            signal.setitimer(signal.ITIMER_REAL, machine.left() + GRACE)
        section()(machine, sheet)
    except Skipped as skipped:
        sheet.status, sheet.why = "SKIPPED", str(skipped)
    except TimeUp:
        if sheet.status != "FAIL":
            sheet.status, sheet.why = "SKIPPED", f"not done after {time.monotonic() - begin:.0f} s"
    except Exception as error:  # the next section runs all the same
        sheet.fail(f"{type(error).__name__}: {first_line(error)}")
        sheet.figures["traceback"] = traceback.format_exc()
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    sheet.seconds = time.monotonic() - begin
    gc.collect()
    if machine.cuda:
        with suppress(RuntimeError):  # of a GPU that has failed
            torch.cuda.empty_cache()


def line(name: str, sheet: Sheet) -> str:
    """What the terminal shows of a section."""
    told = "; ".join(part for part in (sheet.why, sheet.note) if part)
    status = sheet.status if sheet.seconds or sheet.status == "SKIPPED" else "UNFINISHED"
    return f"{status} {name} ({sheet.seconds:.0f} s): {told}"


def write(out: Path, command: str, machine: Machine) -> None:
    """The page, and the JSON beside it."""
    facts = [hardware(machine.device), f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    driver = machine.figure("environment", "driver, power limit")
    facts += [f"driver {driver}"] if driver else []
    lines = [f"# Check of {facts[0]}", "", f"Made by `{command}` on {date.today()}: {', '.join(facts)}.", ""]
    if machine.tiny:
        lines += ["On a CPU, at tiny sizes: that everything runs and agrees. Its times say nothing about a GPU.", ""]
    for name, sheet in machine.sheets.items():
        text = line(name, sheet)
        lines += [f"## {name.capitalize()}", "", text, "", *sheet.page()]
    out.write_text("\n".join(lines).rstrip() + "\n")
    found = dict(command=command, date=str(date.today()), device=facts[0], sections={})
    for name, sheet in machine.sheets.items():
        found["sections"][name] = {key: value for key, value in vars(sheet).items() if key != "parts"}
    out.with_suffix(".json").write_text(to_json(found, indent=1) + "\n")


def check(args: argparse.Namespace) -> None:
    """Refuse what argparse cannot know.

    Raises:
        UserError: names the option.
    """
    args.device = usable(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not 0 < args.minutes < float("inf"):
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")
    check_writable("--out", args.out, (".md",))


def main() -> None:
    """Run the sections; exit status 1 if any failed."""
    begin = time.monotonic()
    args = parse_args()
    check(args)
    register_all_modules(init_default_scope=True)
    MMLogger.get_current_instance().setLevel("WARNING")
    command = f"python {shlex.join(['tools/gpu_check.py', *sys.argv[1:]])}"
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as work:
        tiny = args.device.type == "cpu"
        machine = Machine(args.device, tiny, begin + 60 * args.minutes, Path(work))
        machine.save = partial(write, args.out, command, machine)
        for name in SECTIONS:
            if name in args.sections:
                sheet = machine.sheets[name] = Sheet()
                conduct(name, machine, sheet)
                print(line(name, sheet), flush=True)
                machine.save()
    failed = [name for name, sheet in machine.sheets.items() if sheet.status == "FAIL"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
