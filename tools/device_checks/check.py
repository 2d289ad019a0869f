"""What every section of the check works with: the device and the clock, and the sheet that it fills in."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from mmdet_lors.adamixer.sampling.backends import BACKENDS, NEEDS
from mmdet_lors.analysis.study import table
from mmdet_lors.analysis.timing import seconds


class Skipped(Exception):
    """A section has nothing to do here; says why."""


class TimeUp(BaseException):
    """A section's time is up. No handler of Exception, in here or in a compiler, catches it."""


@dataclass
class Sheet:
    """What a section has found so far; it is kept when the section ends early."""

    status: str = "PASS"
    """PASS, FAIL or SKIPPED."""
    why: str = ""
    """Why it failed or was skipped."""
    seconds: float = 0.0
    note: str = ""
    """Its most telling figures, for the terminal."""
    figures: dict = field(default_factory=dict)
    """All that was measured, for the JSON."""
    parts: list[str | tuple] = field(default_factory=list)
    """Its part of the page: paragraphs, and tables (header, rows) to which rows may still be added."""

    def fail(self, why: str) -> None:
        """The section has failed; it may go on."""
        self.status, self.why = "FAIL", f"{self.why}; {why}" if self.why else why

    def table(self, *header: str) -> list[list[str]]:
        """Add a table to the page.

        Returns:
            Its rows: what is added to them is on the page however the section ends.
        """
        self.parts.append((header, []))
        return self.parts[-1][1]

    def page(self) -> list[str]:
        """Lines of Markdown."""
        lines = []
        for part in self.parts:
            lines += [part, ""] if isinstance(part, str) else [*table(*part), ""]
        return lines

    def limits(self, measured: dict[str, tuple[float, float]]) -> None:
        """Record figures, each of which must be at most its limit, as a table; NaN fails."""
        rows = self.table("", "measured", "at most")
        rows += [[name, f"{x:.2g}", f"{most:g}"] for name, (x, most) in measured.items()]
        self.figures.update({name: x for name, (x, _) in measured.items()})
        over = [f"{name} {x:.2g} > {most:g}" for name, (x, most) in measured.items() if not x <= most]
        if over:
            self.fail("; ".join(over[:3]) + (f" and {len(over) - 3} more" if len(over) > 3 else ""))
        share = max(((x / most, name, x) for name, (x, most) in measured.items() if most), default=(0, "none", 0.0))
        self.note = self.note or f"{len(measured)} figures, nearest to its limit: {share[1]} {share[2]:.2g}"


@dataclass
class Machine:
    """Where and how long the check runs."""

    device: torch.device
    tiny: bool
    """Sizes for a CPU, where only the results count."""
    end: float
    """``time.monotonic()`` when all is over."""
    work: Path
    """A folder for what runs write."""
    sheets: dict[str, Sheet] = field(default_factory=dict)
    """Of the sections so far."""
    until: float = math.inf
    """``time.monotonic()`` when the running section is over."""
    save: Callable[[], None] = lambda: None
    """Writes the page; called between sections, and in long ones after every row."""

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU of CUDA."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds that the running section has."""
        return min(self.until, self.end) - time.monotonic()

    def figure(self, section: str, name: str, default: object = None) -> object:
        """What an earlier section measured."""
        return self.sheets[section].figures.get(name, default) if section in self.sheets else default

    def median_time(
        self, call: Callable[[], object], turns: int = 10, warm_up: int = 3, most: float = 5.0, repeats: int = 1
    ) -> float:
        """Median seconds of a call; fewer turns, at least 3, once they have taken ``most`` seconds.

        Args:
            call: what is timed.
            turns: how often.
            warm_up: earlier calls.
            most: seconds.
            repeats: calls in a row of each turn, of which the mean counts.
        """
        for _ in range(warm_up):
            call()
        taken: list[float] = []
        while len(taken) < turns and (len(taken) < 3 or sum(taken) * repeats < most):
            taken.append(self._timed(call, repeats))
        return median(taken)

    def _timed(self, call: Callable[[], object], repeats: int) -> float:
        if not self.cuda:
            return seconds(call, self.device, repeats)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    def back_ends(self) -> list[str]:
        """The sampling back ends that run here."""
        return [name for name in BACKENDS if name not in NEEDS or not NEEDS[name](self.device)]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm, in float64."""
    ours, theirs = ours.detach().double(), theirs.detach().double().to(ours.device)
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def name_of(dtype: torch.dtype | None) -> str:
    """'float32' for None too."""
    return str(dtype or torch.float32).removeprefix("torch.")
