"""COCO annotation files: what cannot be right is refused, what COCO itself contains is skipped and counted."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_lors.errors import UserError

COCO_HINT = "get train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org and unpack them there"
DIGITS_HINT = "make it with: python tools/dataset_converters/digits_to_coco.py"
OWN_HINT = "check the config's paths, which start from the folder that the command runs in"

NUMBER, FLAG, NAME = {int, float}, {int, float, bool}, {str}
MAX_BEYOND = 0.5
"""Share of boxes that may reach out of their image: above it they are not [x, y, width, height] in its pixels."""


def hint(path: Path) -> str:
    """How to get the data that are missing at this path."""
    if "digits" in path.parts:
        return DIGITS_HINT
    return COCO_HINT if "coco" in path.parts else OWN_HINT


def read_annotations(path: Path) -> dict:
    """A COCO annotation file.

    Raises:
        UserError: no such file, no JSON, or no COCO data set.
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} does not exist; {hint(path)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, deep nesting
        raise UserError(f"annotation file {path} is no JSON: {error}") from error
    missing = [k for k in ("images", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise UserError(f"annotation file {path} is no COCO data set: it has no {' and no '.join(missing)}")
    return content


class _Table:
    """One list of the file, column by column."""

    def __init__(self, path: Path, content: dict, name: str) -> None:
        self.path, self.name, self.rows = path, name, content.get(name, [])
        if type(self.rows) is not list:
            raise UserError(f"annotation file {path}: {name} is a {type(self.rows).__name__}, not a list")
        if set(map(type, self.rows)) - {dict}:
            self.refuse([type(row) is not dict for row in self.rows], "is no object with named fields")

    def refuse(self, bad: Iterable[bool], problem: str | Callable[[dict], str]) -> None:
        """Raise the error if anything is ``bad``: the first one, what is wrong with it, and how many there are."""
        places = list(compress(range(len(self.rows)), bad))
        if places:
            text = problem if isinstance(problem, str) else problem(self.rows[places[0]])
            more = f" ({len(places)} such entries)" if len(places) > 1 else ""
            raise UserError(f"annotation file {self.path}: {self.label(places[0])} {text}{more}")

    def label(self, place: int) -> str:
        """A row as a reader finds it: its place, and its id where it has one."""
        row = self.rows[place]
        known = isinstance(row, dict) and type(row.get("id")) in (int, str)
        return f"{self.name}[{place}]" + (f" (id {row['id']!r})" if known else "")

    def column(self, field: str, types: set[type], meaning: str) -> list:
        """The values of a field that every row must have.

        Raises:
            UserError: rows without it, or where it has another type.
        """
        try:
            values = list(map(itemgetter(field), self.rows))
        except KeyError:
            self.refuse((field not in row for row in self.rows), f"has no {field}")
        if set(map(type, values)) - types:
            self.refuse(
                (type(value) not in types for value in values),
                lambda row: f"has {field} {_short(row[field])}, which is not {meaning}",
            )
        return values

    def ids(self, field: str, unique: bool) -> list:
        """A column of ids: whole numbers, or strings, but not both."""
        values = self.column(field, {int, str}, "a whole number")
        if len(set(map(type, values))) > 1:
            self.refuse((type(v) is str for v in values), lambda row: f"has {field} {row[field]!r}, others are numbers")
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
                lambda row: f"has bbox {_short(row['bbox'])}, which is not a list of 4 numbers",
            )
        boxes = _floats(chain.from_iterable(values), 4 * len(values)).reshape(-1, 4)
        self._refuse_not_finite("bbox", boxes.sum(axis=1))
        return boxes

    def numbers(self, field: str) -> np.ndarray:
        """A column of finite numbers, (N,)."""
        numbers = _floats(self.column(field, NUMBER, "a number"), len(self.rows))
        self._refuse_not_finite(field, numbers)
        return numbers

    def flags(self, field: str, required: bool) -> np.ndarray:
        """A column of 0 and 1, (N,) bool; rows without it have 0, unless it is ``required``."""
        if required:
            values = self.column(field, FLAG, "0 or 1")
        else:
            values = [row.get(field) or 0 for row in self.rows]
            if set(map(type, values)) - FLAG:
                self.refuse(
                    (type(value) not in FLAG for value in values),
                    lambda row: f"has {field} {_short(row[field])}, which is not 0 or 1",
                )
        return np.fromiter(map(bool, values), bool, len(values))

    def _refuse_not_finite(self, field: str, values: np.ndarray) -> None:
        # Boxes become float32: what overflows there is as bad as an infinity.
        bad = ~(np.abs(values) < np.finfo(np.float32).max)
        if bad.any():
            self.refuse(bad, lambda row: f"has {field} {_short(row[field])}, which is not finite")


def _floats(values: Iterable, count: int) -> np.ndarray:
    values = list(values)
    try:
        return np.fromiter(values, np.float64, count)
    except OverflowError:  # JSON's integers have no bound
        return np.array([float(v) if abs(v) < 1e300 else np.inf for v in values], np.float64)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_annotations(
    content: dict, path: Path, classes: Sequence[str] | None = None, evaluated: bool = False
) -> list[str]:
    """Refuse a data set that cannot be right; docs/reliability.md has the table of what is refused and what skipped.

    Args:
        content: what :func:`read_annotations` returned.
        path: its file, for messages.
        classes: the config's classes; None: all categories.
        evaluated: whether it is for validation or test, where COCO's evaluation reads more fields and images without
            annotations are what a test server gives out; otherwise for training.

    Returns:
        What is skipped or looks odd, one line a kind, with the number and the first one.

    Raises:
        UserError: the first kind of what is refused, with the first one and the number.
    """
    category_ids = check_categories(content, path, classes)
    images, categories = (_Table(path, content, name) for name in ("images", "categories"))
    width, height, image_ids = _check_images(images)
    if evaluated and "annotations" not in content:
        return []
    annotations = _Table(path, content, "annotations")
    if not annotations.rows:
        if not evaluated:
            raise UserError(f"annotation file {path} has no annotations to learn from")
        return [f"{path} has no annotations: nothing can be evaluated"]
    annotations.ids("id", unique=True)
    labels = annotations.ids("category_id", unique=False)
    of_image = annotations.ids("image_id", unique=False)
    boxes, areas = annotations.boxes(), annotations.numbers("area")
    crowd = annotations.flags("iscrowd", required=evaluated)
    known_labels = set(category_ids)
    if not known_labels.issuperset(labels):
        annotations.refuse(
            (label not in known_labels for label in labels),
            lambda row: f"has category_id {row['category_id']!r}, which no category has",
        )
    if (boxes[:, 2:] < 0).any():
        annotations.refuse(
            (boxes[:, 2:] < 0).any(axis=1),
            lambda row: f"has bbox {_short(row['bbox'])} of negative size; it must be [x, y, width, height]",
        )

    # The same rules as mmdet's CocoDataset.parse_data_info, which skips them silently.
    rows = np.fromiter(map({i: row for row, i in enumerate(image_ids)}.get, of_image, repeat(-1)), np.int64, len(boxes))
    nowhere = rows < 0
    low, size = boxes[:, :2], boxes[:, 2:]
    limit = np.stack([width, height], axis=1)[rows]
    inside = np.clip(np.minimum(low + size, limit) - np.maximum(low, 0), 0, None).prod(axis=1)
    small = ~nowhere & ((size < 1).any(axis=1) | (areas <= 0))
    outside = ~nowhere & ~small & (inside == 0)
    beyond = ~nowhere & ~small & ~outside & ((low < -1) | (low + size > limit + 1)).any(axis=1)
    if (outside | beyond).sum() > MAX_BEYOND * (~nowhere & ~small).sum():
        annotations.refuse(
            outside | beyond,
            lambda row: (
                f"has bbox {_short(row['bbox'])}, which reaches out of its image, as do more than "
                f"{MAX_BEYOND:.0%} of all; it must be [x, y, width, height] in pixels"
            ),
        )
    asked = {row["id"] for row in categories.rows if classes is None or row["name"] in classes}
    wanted = np.fromiter(map(asked.__contains__, labels), bool, len(boxes))
    usable = wanted & ~nowhere & ~small & ~outside
    if not evaluated and not (usable & ~crowd).any():
        raise UserError(
            f"annotation file {path} has no box to learn from: of {len(boxes)} annotations {nowhere.sum()} are of "
            f"images that it does not have, {small.sum()} below 1 pixel, {outside.sum()} outside their image, "
            f"{(~wanted).sum()} of other classes and {crowd.sum()} crowds"
        )
    crowds_only = np.setdiff1d(rows[usable & crowd], rows[usable & ~crowd]) if crowd.any() else np.zeros(0, int)
    found = {
        "annotations of images that the file does not have: skipped": nowhere,
        "boxes less than 1 pixel wide or high, or of no area: skipped": small,
        "boxes outside their image: skipped": outside,
        "boxes that reach out of their image: clipped": beyond,
    }
    lines = [
        f"{path}: {bad.sum()} of {len(boxes)} annotations are {kind}; first {annotations.label(int(bad.argmax()))} "
        f"bbox {_short(annotations.rows[bad.argmax()]['bbox'])}"
        for kind, bad in found.items()
        if bad.any()
    ]
    if len(crowds_only) and not evaluated:
        lines.append(
            f"{path}: {len(crowds_only)} images have crowd boxes alone and train as images without objects; first "
            f"{images.label(int(crowds_only[0]))}"
        )
    return lines


def _check_images(images: _Table) -> tuple[np.ndarray, np.ndarray, list]:
    """Widths and heights in pixels, (M,), and ids."""
    if not images.rows:
        raise UserError(f"annotation file {images.path} has no images")
    ids = images.ids("id", unique=True)
    names = images.column("file_name", NAME, "a file's name")
    images.refuse((not name.strip() or "\0" in name for name in names), "has no usable file_name")
    sizes = [images.numbers(field) for field in ("width", "height")]
    for field, size in zip(("width", "height"), sizes, strict=True):
        images.refuse(size < 1, lambda row, field=field: f"has {field} {row[field]!r}; it must be 1 or more pixels")
    return *sizes, ids


def check_categories(content: dict, path: Path, classes: Sequence[str] | None) -> list:
    """Category ids; see :func:`check_annotations`.

    Raises:
        UserError: categories without id or name, two of one name, or names that are not the config's, in its order.
    """
    categories = _Table(path, content, "categories")
    if not categories.rows:
        raise UserError(f"annotation file {categories.path} has no categories")
    ids = categories.ids("id", unique=True)
    names = categories.column("name", NAME, "a name")
    counts = Counter(names)
    categories.refuse((counts[name] > 1 for name in names), lambda row: f"has the name {row['name']!r} of another one")
    unknown = [name for name in classes or () if name not in counts]
    if unknown:
        raise UserError(
            f"{categories.path} has no category {', '.join(map(repr, unknown[:3]))}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''} of the config's {len(classes)} classes; "
            f"it has {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"
        )
    found = [name for name in names if classes is not None and name in classes]
    # mmdet gives labels in the file's order, names in the config's.
    for theirs, ours in zip(found, dict.fromkeys(classes or ()), strict=True):
        if theirs != ours:
            raise UserError(
                f"annotation file {categories.path} has category {theirs!r} where the config's classes have {ours!r}: "
                "both must have the same order"
            )
    return ids
