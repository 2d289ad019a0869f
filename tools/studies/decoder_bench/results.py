"""The finished runs of the decoder study, and what their differences say."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from mmdet_lors.engine.checkpoint.whole_files import write_whole
from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json

from .rows import ROWS, Bench, Row

MARGIN = 0.01
"""A row reaches another if the interval of its AP minus the other's lies above minus this."""


Key = tuple[int, str]
"""Seed, and digest of the features: runs with equal keys are a pair."""
Found = dict[str, dict[Key, dict]]
"""Row -> key -> what its run returned."""


class Results:
    """The finished runs, in a JSON file that is written after each.

    Args:
        path: the file; it may not exist yet.
        bench: the study's.

    Raises:
        UserError: the file has the results of another bench.
    """

    def __init__(self, path: Path, bench: Bench) -> None:
        self.path, self.content = path, dict(bench=asdict(bench), features={}, rows={})
        if path.is_file():
            before = json.loads(path.read_text())
            if before["bench"] != self.content["bench"]:
                raise UserError(f"{path} has runs of {before['bench']}; choose another --out")
            self.content = before
        self.digest = next(reversed(self.content["features"]), "")

    def use(self, features: dict) -> None:
        """Note the features of the runs to come: another machine rounds differently, and makes others."""
        self.digest = features["digest"]
        self.content["features"].setdefault(self.digest, features)

    def of(self, row: Row) -> dict[Key, dict]:
        """The finished runs of a row, as it is now."""
        kept = self.content["rows"].get(row.name, {})
        if kept.get("settings") != json.loads(to_json(asdict(row) | dict(what="", seeds=0))):
            return {}
        return {(outcome["seed"], outcome["features"]): outcome for outcome in kept["runs"]}

    def found(self) -> Found:
        """All finished runs, by row."""
        return {row.name: self.of(row) for row in ROWS}

    def add(self, row: Row, seed: int, outcome: dict) -> None:
        """Keep a finished run."""
        key = seed, self.digest
        runs = self.of(row) | {key: outcome | dict(seed=seed, features=self.digest)}
        self.content["rows"][row.name] = dict(settings=asdict(row) | dict(what="", seeds=0), runs=list(runs.values()))
        write_whole(self.path, (to_json(self.content, indent=1) + "\n").encode())

    def missing(self, names: list[str] | None = None, seeds: int | None = None) -> list[tuple[Row, int]]:
        """Runs that are still to be done, failed ones again: all rows with one seed before any with two.

        A seed is done when all rows have been run with it on the same features; else it is gone on with, or begun
        anew, on the present ones.

        Args:
            names: of the rows that are wanted; None for all.
            seeds: at most as many of each row.
        """
        rows = [row for row in ROWS if not names or row.name in names]
        done = {row.name: succeeded(self.found(), row.name).keys() for row in rows}
        todo = []
        for seed in range(min(max(row.seeds for row in rows), seeds or sys.maxsize)):
            wanted = [row for row in rows if seed < row.seeds]
            left = {digest: [row for row in wanted if (seed, digest) not in done[row.name]]
                    for digest in (*self.content["features"], self.digest)}  # fmt: skip
            if all(left.values()):
                todo += [(row, seed) for row in left[self.digest]]
        return todo


def succeeded(found: Found, row: str) -> dict[Key, dict]:
    """The runs of a row that did not fail."""
    return {key: outcome for key, outcome in found.get(row, {}).items() if "failed" not in outcome}


def residual(found: Found) -> tuple[float, int]:
    """Standard deviation that the effects of row and of key leave in AP, and its degrees of freedom.

    ``AP = row + key + rest`` by least squares over all runs: the two-way analysis of variance, pooled over the rows,
    whose two to five seeds tell little by themselves. With two rows of equal keys it is the paired test's.
    """
    runs = [(name, key, run["ap"]) for name in found for key, run in succeeded(found, name).items()]
    effects = dict.fromkeys(effect for *both, _ in runs for effect in both)
    design = np.array([[effect in (name, key) for effect in effects] for name, key, _ in runs], float)
    aps = np.array([ap for *_, ap in runs])
    fitted, _, rank, _ = np.linalg.lstsq(design, aps, rcond=None)
    freedom = len(runs) - int(rank)
    rest = float(((aps - design @ fitted) ** 2).sum())
    return (math.sqrt(rest / freedom) if freedom else math.nan), freedom


class Difference(NamedTuple):
    """Mean of a row's AP minus another's with the same seed and features, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Found, row: str, base: str) -> "Difference | None":
        """None if there are fewer than two pairs."""
        runs, others = (succeeded(found, name) for name in (row, base))
        each = [runs[key]["ap"] - others[key]["ap"] for key in sorted(runs.keys() & others.keys())]
        if len(each) < 2:
            return None
        deviation, freedom = residual(found)
        half = float(student.ppf(0.975, freedom)) * deviation * math.sqrt(2 / len(each))
        return cls(mean(each), mean(each) - half, mean(each) + half)

    def verdict(self, reaches: bool) -> str:
        """What it says of a claim that the row reaches the other's AP, or, if not ``reaches``, that it has more."""
        if self.low > (-MARGIN if reaches else 0):
            return "holds here"
        return "does not hold here" if self.high <= 0 else "cannot be told"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
