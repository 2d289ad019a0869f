"""Wall-clock times of several functions that take turns, so that a slow moment of the machine hits them all."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from .study import machine


def synchronise(device: torch.device | str) -> None:
    """Wait until a GPU has finished; a CPU needs no waiting."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device | str, steps: int = 1) -> float:
    """Seconds that one call takes, as the mean of ``steps`` calls in a row."""
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(steps):
        call()
    synchronise(device)
    return (time.perf_counter() - begin) / steps


def busy() -> float:
    """CPU seconds that all work on this machine has taken since its start; NaN where the system does not say."""
    counts = Path("/proc/stat")
    if not counts.is_file():
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, counts.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Observed(NamedTuple):
    """What :func:`observed` saw."""

    seconds: float
    """What the function returned."""
    wall: float
    """Seconds from its start to its end."""
    others: float
    """CPU seconds that all other processes took meanwhile."""


def observed(timed: Callable[[], float]) -> Observed:
    """Run a function that does its work and returns its seconds, and see what else the machine does."""
    begin, before = time.perf_counter(), busy() - time.process_time()
    taken = timed()
    others = busy() - time.process_time() - before
    return Observed(taken, time.perf_counter() - begin, others)


def interleaved(
    timed: Mapping[str, Callable[[], float]], turns: int, warm_up: int = 1, alternate: bool = False
) -> dict[str, list[float]]:
    """Time each function in turn, round after round.

    Args:
        timed: functions that do their work and return its seconds, by name.
        turns: rounds that count.
        warm_up: earlier rounds, which do not count.
        alternate: run every second round backwards, so that no function always follows the same one.

    Returns:
        The seconds of each function, one number per round.
    """
    found: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(-warm_up, turns):
        for name in reversed(timed) if alternate and turn % 2 else timed:
            taken = timed[name]()
            if turn >= 0:
                found[name].append(taken)
    return found


def ratio(found: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """The median over rounds of the ratio of times within a round."""
    return median(a / b for a, b in zip(found[name], found[base], strict=True))


def hardware(device: torch.device | str) -> str:
    """The hardware in use: the GPU, or processor and number of cores."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else machine()
