"""Runs of the tools as processes of their own, on the device: launch, SIGTERM, loss scaler, the quickstart."""

import importlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from . import ROOT
from .check import Machine, Sheet, Skipped

CONFIG = "configs/lors/adamixer-lors_r18_digits.py"
TEXT = """
_base_ = {base!r}
custom_imports = dict(imports=["mmdet_lors", "device_checks.hooks"], allow_failed_imports=False)
train_dataloader = dict(num_workers={workers}, dataset=dict(data_root={data!r}))
val_dataloader = dict(num_workers={workers}, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data!r} + "/annotations/val.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs={epochs}, val_interval={interval})
default_hooks = dict(logger=dict(interval={logged}), checkpoint=dict(interval={saved}))
custom_hooks = [dict(type="ServeFoldedHook"), dict(type="StopOnNonFiniteHook"), *{hooks!r}]
"""
AP = 0.55
"""What the quickstart's config has to reach."""


class Process:
    """A tool that runs; its output goes to a file."""

    def __init__(self, command: list[str], log: Path, machine: Machine) -> None:
        self.log, self.folder = log, str(machine.work)
        paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)), PYTHON=sys.executable, PORT=str(port))
        if not machine.cuda:
            env["CUDA_VISIBLE_DEVICES"] = ""
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, most: float) -> int | None:
        """Its exit status; None if it had to be killed after ``most`` seconds."""
        try:
            return self.process.wait(max(1.0, most))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def finish(self, most: float) -> int:
        """:meth:`wait`, where running out of time ends the section.

        Raises:
            Skipped: it had to be killed.
        """
        status = self.wait(most)
        if status is None:
            raise Skipped(f"time ran out; its last line: {self.last_line()}")
        return status

    def wait_for(self, condition: Callable[[], bool], most: float) -> bool:
        """Whether a condition came true before the process ended or time ran out."""
        end = time.monotonic() + most
        while time.monotonic() < end and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.05)
        return condition()

    def stop(self, most: float) -> int | None:
        """Send SIGTERM, and :meth:`wait`."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(most)

    def kill(self) -> None:
        """End it and its data workers, if they still run."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        """The last line that it has printed, without the folder's name."""
        lines = [line.strip() for line in self.output().splitlines() if line.strip()] or ["no output"]
        return lines[-1].replace(self.folder, "")[:2000]


class Runs:
    """Runs on a data set of 32 + 8 pictures of digits.

    Args:
        machine: where.
        name: of their folder.
    """

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.folder = machine, machine.work / name
        self.folder.mkdir()
        self.trace = self.folder / "trace.jsonl"

    @cached_property
    def data(self) -> Path:
        """The small data set, made once."""
        return make_digits(self.machine.work / "tiny", 32, 8)

    def config(self, *hooks: dict, epochs: int = 2, interval: int = 1000, data: Path | None = None,
               workers: int = 0, logged: int = 1, saved: int = 1, trace: bool = True) -> Path:  # fmt: skip
        """Write a config: the quickstart's on this data, with further hooks and a trace, which waits for the loss."""
        hooks = [*([dict(type="TraceHook", file=str(self.trace))] if trace else []), *hooks]
        path = self.folder / "config.py"
        values = dict(epochs=epochs, interval=interval, workers=workers, logged=logged, saved=saved, hooks=hooks)
        path.write_text(TEXT.format(base=str(ROOT / CONFIG), data=str(data or self.data), **values))
        return path

    def train(self, work: str, config: Path, *arguments: str) -> Process:
        """Start tools/train.py."""
        command = [sys.executable, "tools/train.py", str(config), "--device", self.machine.device.type]
        command += ["--work-dir", str(self.folder / work), *arguments]
        return Process(command, self.folder / f"{work}.{time.monotonic_ns()}.log", self.machine)

    def traced(self) -> list[dict]:
        """The iterations so far."""
        text = self.trace.read_text() if self.trace.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def make_digits(out: Path, train_images: int, val_images: int) -> Path:
    """A digits data set, unless it is there."""
    if not (out / "annotations/val.json").is_file():
        folder = str(ROOT / "tools/dataset_converters")
        if folder not in sys.path:
            sys.path.append(folder)
        importlib.import_module("digits_to_coco").build(out, train_images=train_images, val_images=val_images)
    return out


def launch(machine: Machine, sheet: Sheet) -> None:
    """Section 10: one process of torchrun, over NCCL on a GPU, trains and evaluates."""
    runs = Runs(machine, "launch")
    config = runs.config(epochs=2, interval=2)
    command = ["bash", "tools/dist_train.sh", str(config), "1", "--work-dir", str(runs.folder / "work")]
    command += ["--device", machine.device.type]
    begin = time.monotonic()
    process = Process(command, runs.folder / "log.txt", machine)
    status, trace = process.finish(machine.left()), runs.traced()
    sheet.figures.update(status=status, trace=trace, seconds=time.monotonic() - begin)
    if status != 0:
        sheet.fail(f"exit status {status}: {process.last_line()}")
    elif len(trace) != 8 or not all(math.isfinite(line["loss"]) for line in trace):
        sheet.fail(f"of 8 iterations, {sum(math.isfinite(line['loss']) for line in trace)} had a finite loss")
    else:
        sheet.note = f"8 iterations, loss {trace[0]['loss']:.2f} to {trace[-1]['loss']:.2f}"


def stop_and_resume(machine: Machine, sheet: Sheet) -> None:
    """Section 11: SIGTERM to a run, which saves and ends well; --resume goes on with the next iteration."""
    runs = Runs(machine, "stop")
    config = runs.config(epochs=1000)
    seen = 0
    for number, arguments in enumerate(((), ("--resume",))):
        process = runs.train("work", config, *arguments)
        wanted = seen + 5
        if not process.wait_for(lambda wanted=wanted: len(runs.traced()) >= wanted, machine.left() - 2):
            process.kill()
            sheet.fail(f"run {number + 1} did not get so far: {process.last_line()}")
            break
        status, seen = process.stop(machine.left()), len(runs.traced())
        saved = (runs.folder / "work/stopped.pth").is_file() or any((runs.folder / "work").glob("epoch_*.pth"))
        if status != 0 or not saved or "stopped by SIGTERM, saved" not in process.output():
            sheet.fail(f"run {number + 1}: exit status {status}, checkpoint {saved}: {process.last_line()}")
        sheet.figures[f"iterations of run {number + 1}"] = seen
    iterations = [line["iter"] for line in runs.traced()]
    sheet.figures["iterations"] = iterations
    if iterations != list(range(len(iterations))):
        sheet.fail(f"iterations are not 0, 1, 2, ...: {iterations}")
    elif sheet.status == "PASS":
        sheet.note = f"stopped after iteration {sheet.figures['iterations of run 1']}, resumed with the next"


def loss_scaler(machine: Machine, sheet: Sheet) -> None:
    """Section 12: with float16, steps that the loss scaler skips do not stop a run; NaN does."""
    if not machine.cuda:
        raise Skipped("float16 with a loss scaler needs a CUDA GPU")
    runs, nan_at = Runs(machine, "scaler"), 40
    process = runs.train("work", runs.config(dict(type="DisturbHook", raise_scale_at=3, nan_at=nan_at), epochs=20),
                         "--amp", "float16")  # fmt: skip
    status, trace = process.finish(machine.left()), runs.traced()
    skipped = sum(b["scale"] < a["scale"] for a, b in zip(trace, trace[1:], strict=False))
    message = process.last_line()
    sheet.figures.update(status=status, trace=trace, skipped=skipped, message=message)
    if not skipped or len(trace) < nan_at:
        sheet.fail(f"{len(trace)} iterations, {skipped} skipped: {message}")
    elif status != 1 or not re.match(
        rf"error: .* at epoch 11, iteration {nan_at + 1}, on images .*; first non-finite: ", message
    ):
        sheet.fail(f"exit status {status}: {message}")
    else:
        sheet.note = f"{skipped} steps skipped from a scale of 2**34, NaN stopped iteration {nan_at + 1}"


def digits(machine: Machine, sheet: Sheet) -> None:
    """Section 13: the quickstart's config to its AP, or as far as the time goes."""
    runs = Runs(machine, "digits")
    epochs, interval, images = (2, 1, (32, 8)) if machine.tiny else (18, 3, (2000, 300))
    made = time.monotonic()
    data = make_digits(machine.work / ("tiny" if machine.tiny else "digits"), *images)
    workers = 0 if machine.tiny else max(1, min(8, (os.cpu_count() or 2) // 2))
    config = runs.config(epochs=epochs, interval=interval, data=data, workers=workers, logged=50, trace=False)
    begin = time.monotonic()
    process = runs.train("work", config)
    # Saving and ending well takes a few seconds.
    ended = process.wait_for(lambda: False, machine.left() - 12) or process.process.poll() is not None
    status = process.wait(5) if ended else process.stop(10)
    taken = time.monotonic() - begin
    scalars = [json.loads(line) for path in runs.folder.glob("work/*/vis_data/scalars.json")
               for line in path.read_text().splitlines()]  # fmt: skip
    evaluated = [line["coco/bbox_mAP"] for line in scalars if "coco/bbox_mAP" in line]
    times = [line["time"] for line in scalars if "iter" in line and "time" in line and "loss" in line]
    ap = evaluated[-1] if evaluated else None
    sheet.figures.update(
        status=status, ap=evaluated, seconds=taken, data_seconds=begin - made, seconds_per_iteration=times,
        epochs=epochs, interval=interval, workers=workers,
    )  # fmt: skip
    done = f"{len(evaluated) * interval} of {epochs} epochs evaluated"
    speed = f", {1e3 * times[-1]:.0f} ms an iteration" if times else ""
    told = f"AP {ap:.3f}" if ap is not None else "no AP"
    sheet.parts.append(f"AP after every {interval} epochs: {', '.join(f'{x:.3f}' for x in evaluated) or 'none'}.")
    sheet.note = f"{told} after {done}{speed}, {taken:.0f} s with start and evaluations"
    if status != 0:
        sheet.fail(f"exit status {status}: {process.last_line()}")
    elif machine.tiny:
        sheet.note += "; too little data for an AP, see tools/quickstart.sh"
    elif not ended and (ap is None or ap < AP):
        raise Skipped(f"time ran out, {done}")
    elif ap is None or ap < AP:
        sheet.fail(f"AP {ap} is below {AP}")
