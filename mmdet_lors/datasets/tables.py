"""The lists of a COCO annotation file, column by column, each with the rules that its values must follow."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain, compress
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_lors.errors import UserError

NUMBER, FLAG, NAME = {int, float}, {int, float, bool}, {str}
MAX_ID = 2**63
"""pycocotools sorts ids with numpy, which makes floats of ids from here on: several become equal."""


class Table:
    """One list of the file, column by column."""

    def __init__(self, path: Path, content: dict, name: str) -> None:
        self.path, self.name, self.rows = path, name, content.get(name, [])
        if type(self.rows) is not list:
            raise UserError(f"annotation file {path}: {name} is a {type(self.rows).__name__}, not a list")
        if set(map(type, self.rows)) - {dict}:
            self.refuse([type(row) is not dict for row in self.rows], "is not an object with named fields")

    def refuse(self, bad: Iterable[bool], problem: str | Callable[[dict], str]) -> None:
        """Raise an error if any row is ``bad``; it names the first, what is wrong with it, and how many there are."""
        places = list(compress(range(len(self.rows)), bad))
        if places:
            text = problem if isinstance(problem, str) else problem(self.rows[places[0]])
            more = f" ({len(places)} such entries)" if len(places) > 1 else ""
            raise UserError(f"annotation file {self.path}: {self.label(places[0])} {text}{more}")

    def label(self, place: int) -> str:
        """How messages name a row: by its place, and by its id if it has one."""
        row = self.rows[place]
        known = isinstance(row, dict) and type(row.get("id")) in (int, str)
        return f"{self.name}[{place}]" + (f" (id {row['id']!r})" if known else "")

    def column(self, field: str, types: set[type], meaning: str) -> list:
        """The values of a field that every row must have.

        Raises:
            UserError: a row has no such field, or one of another type.
        """
        try:
            values = list(map(itemgetter(field), self.rows))
        except KeyError:
            self.refuse((field not in row for row in self.rows), f"has no {field}")
        if set(map(type, values)) - types:
            self.refuse(
                (type(value) not in types for value in values),
                lambda row: f"has {field} {short(row[field])}, which is not {meaning}",
            )
        return values

    def ids(self, field: str, unique: bool = False, lowest: int = 0, why: str = "") -> list[int]:
        """A column of ids: whole numbers from ``lowest`` up; ``why`` says what is wrong with lower ones."""
        values = self.column(field, {int}, "a whole number")
        if values and not lowest <= min(values) <= max(values) < MAX_ID:
            self.refuse(
                (not lowest <= value < MAX_ID for value in values),
                lambda row: f"has {field} {short(row[field])}; it must be a whole number from {lowest} below 2^63{why}",
            )
        if unique and len(set(values)) < len(values):
            counts = Counter(values)
            self.refuse((counts[value] > 1 for value in values), f"shares its {field} with another one")
        return values

    def boxes(self) -> np.ndarray:
        """``bbox`` of every row, (N, 4) [x, y, width, height] in pixels."""
        values = self.column("bbox", {list}, "a list of 4 numbers")
        if set(map(len, values)) - {4} or set(map(type, chain.from_iterable(values))) - NUMBER:
            self.refuse(
                (len(box) != 4 or bool(set(map(type, box)) - NUMBER) for box in values),
                lambda row: f"has bbox {short(row['bbox'])}, which is not a list of 4 numbers",
            )
        boxes = _floats(chain.from_iterable(values), 4 * len(values)).reshape(-1, 4)
        self._refuse_not_finite("bbox", boxes.sum(axis=1))
        return boxes

    def numbers(self, field: str) -> np.ndarray:
        """A column of finite numbers, (N,)."""
        numbers = _floats(self.column(field, NUMBER, "a number"), len(self.rows))
        self._refuse_not_finite(field, numbers)
        return numbers

    def flags(self, field: str, required: bool = False) -> np.ndarray:
        """A column of 0 and 1, (N,) bool; rows without it have 0, unless it is ``required``."""
        values = self.column(field, FLAG, "0 or 1") if required else [row.get(field) or 0 for row in self.rows]
        if set(map(type, values)) - FLAG or set(values) - {0, 1}:
            self.refuse(
                (type(value) not in FLAG or value not in (0, 1) for value in values),
                lambda row: f"has {field} {short(row[field])}, which is not 0 or 1",
            )
        return np.fromiter(map(bool, values), bool, len(values))

    def masks(self, sizes: Iterable[list[float] | None]) -> None:
        """Refuse rows whose ``segmentation`` pycocotools would not read as a mask of an image of (width, height).

        A size of None stands for a row without an image, which is never read.
        """
        self.refuse(
            (size and not _is_mask(row.get("segmentation"), size) for row, size in zip(self.rows, sizes, strict=True)),
            lambda row: (
                f"has segmentation {short(row.get('segmentation'))}, which is neither a list of polygons of 6 or more "
                "numbers nor run lengths of its image's size"
            ),
        )

    def _refuse_not_finite(self, field: str, values: np.ndarray) -> None:
        # Boxes become float32: what overflows there is as bad as an infinity.
        bad = ~(np.abs(values) < np.finfo(np.float32).max)
        if bad.any():
            self.refuse(bad, lambda row: f"has {field} {short(row[field])}, which is not finite")


def _floats(values: Iterable, count: int) -> np.ndarray:
    values = list(values)
    try:
        return np.fromiter(values, np.float64, count)
    except OverflowError:  # JSON's integers have no bound
        return np.array([float(v) if abs(v) < 1e300 else np.inf for v in values], np.float64)


def _is_mask(value: Any, size: list[float]) -> bool:
    if type(value) is dict:
        counts = value.get("counts")
        return value.get("size") == [size[1], size[0]] and type(counts) in (list, str) and len(counts) > 0
    return (
        type(value) is list
        and len(value) > 0
        and all(type(polygon) is list and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in value)
        and not set(map(type, chain.from_iterable(value))) - NUMBER
        and bool(np.isfinite(_floats(chain.from_iterable(value), sum(map(len, value)))).all())
    )


def short(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
