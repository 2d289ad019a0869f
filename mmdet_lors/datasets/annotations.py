"""Checks of COCO annotation files: what cannot be right is refused, what COCO itself contains is skipped and counted.

The check before a run, the data set and the metric all use these rules; docs/reliability.md lists them.
"""

import gc
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import numpy as np

from mmdet_lors.errors import UserError

from .tables import NAME, Table, short

COCO_HINT = "get train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org and unpack them there"
DIGITS_HINT = "make it with: python tools/dataset_converters/digits_to_coco.py"
OWN_HINT = "check the config's paths, which start from the folder that the command runs in"

MAX_BEYOND = 0.5
"""Largest share of boxes that may extend beyond their image; above it they are not [x, y, width, height] in pixels."""
MAX_AREA = 1e10
"""Area in pixels above which pycocotools leaves an object out of every metric."""
NO_MATCH = ": COCO's evaluation reads 0 as 'no match'; count annotations from 1"


def hint(path: Path) -> str:
    """How to get the data that is missing at this path."""
    if "digits" in path.parts:
        return DIGITS_HINT
    return COCO_HINT if "coco" in path.parts else OWN_HINT


def read_annotations(path: Path) -> dict:
    """Read a COCO annotation file.

    Raises:
        UserError: the file does not exist, is not JSON, or is not a COCO data set.
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} does not exist; {hint(path)}")
    try:
        with without_collector():
            content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits, deep nesting
        raise UserError(f"annotation file {path} is not JSON: {error}") from error
    missing = [k for k in ("images", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise UserError(f"annotation file {path} is not a COCO data set: it has no {' and no '.join(missing)}")
    return content


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause Python's garbage collector, which would scan millions of new objects again and again for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_annotations(
    content: dict, path: Path, classes: Sequence[str] | None = None, evaluated: bool = False, masks: bool = False
) -> list[str]:
    """Refuse a data set that cannot be right; docs/reliability.md has the table of what is refused and what skipped.

    Args:
        content: what :func:`read_annotations` returned.
        path: its file, for messages.
        classes: the config's classes; None: all categories.
        evaluated: whether it is for validation or test, where COCO's evaluation reads more fields, and where a test
            server's file has images without annotations; otherwise it is for training.
        masks: whether masks are evaluated as well.

    Returns:
        What is skipped or looks wrong: one line per kind, with the number of entries and the first of them.

    Raises:
        UserError: the first kind of entry that is refused, with the first such entry and their number.
    """
    category_ids = check_categories(content, path, classes)
    images, categories = (Table(path, content, name) for name in ("images", "categories"))
    width, height, image_ids = _check_images(images)
    if evaluated and "annotations" not in content:
        return []
    annotations = Table(path, content, "annotations")
    if not annotations.rows:
        if not evaluated:
            raise UserError(f"annotation file {path} has no annotations to learn from")
        return [f"{path} has no annotations: nothing can be evaluated"]
    annotations.ids("id", unique=True, **(dict(lowest=1, why=NO_MATCH) if evaluated else {}))
    labels = annotations.ids("category_id")
    of_image = annotations.ids("image_id")
    boxes, areas = annotations.boxes(), annotations.numbers("area")
    crowd, ignored = annotations.flags("iscrowd", required=evaluated), annotations.flags("ignore")
    known_labels = set(category_ids)
    if not known_labels.issuperset(labels):
        annotations.refuse(
            (label not in known_labels for label in labels),
            lambda row: f"has category_id {row['category_id']!r}, which no category has",
        )
    if (boxes[:, 2:] < 0).any():
        annotations.refuse(
            (boxes[:, 2:] < 0).any(axis=1),
            lambda row: f"has bbox {short(row['bbox'])} of negative size; it must be [x, y, width, height]",
        )
    if evaluated and ((areas < 0) | (areas > MAX_AREA)).any():
        annotations.refuse(
            (areas < 0) | (areas > MAX_AREA),
            lambda row: f"has area {short(row['area'])}: COCO's evaluation counts objects of 0 to {MAX_AREA:g} pixels",
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
                f"has bbox {short(row['bbox'])}, which extends beyond its image, as do more than "
                f"{MAX_BEYOND:.0%} of all; it must be [x, y, width, height] in pixels"
            ),
        )
    if masks:
        sizes = limit.tolist()
        annotations.masks(None if gone else size for gone, size in zip(nowhere, sizes, strict=True))
    asked = {row["id"] for row in categories.rows if classes is None or row["name"] in classes}
    wanted = np.fromiter(map(asked.__contains__, labels), bool, len(boxes))
    usable = wanted & ~ignored & ~nowhere & ~small & ~outside
    if not evaluated and not (usable & ~crowd).any():
        raise UserError(
            f"annotation file {path} has no box to learn from: of {len(boxes)} annotations {nowhere.sum()} are for "
            f"images that it does not list, {small.sum()} below 1 pixel, {outside.sum()} outside their image, "
            f"{(~wanted).sum()} of other classes, {ignored.sum()} to be ignored and {crowd.sum()} crowds"
        )
    crowds_only = np.setdiff1d(rows[usable & crowd], rows[usable & ~crowd]) if crowd.any() else np.zeros(0, int)
    # COCO's evaluation counts every object of an image that the file lists.
    skipped = "not loaded, but counted by COCO's evaluation" if evaluated else "skipped"
    found = {
        "are for images that the file does not list: skipped": nowhere,
        f"have a box less than 1 pixel wide or high, or of no area: {skipped}": small,
        f"have a box outside their image: {skipped}": outside,
        f"are marked 'ignore': {skipped}": ignored,
        "have a box that extends beyond their image: clipped": beyond,
    }
    lines = [
        f"{path}: {bad.sum()} of {len(boxes)} annotations {kind}; first: {annotations.label(int(bad.argmax()))} "
        f"bbox {short(annotations.rows[bad.argmax()]['bbox'])}"
        for kind, bad in found.items()
        if bad.any()
    ]
    if len(crowds_only) and not evaluated:
        lines.append(
            f"{path}: {len(crowds_only)} images have only crowd boxes and train as images without objects; first: "
            f"{images.label(int(crowds_only[0]))}"
        )
    return lines


def _check_images(images: Table) -> tuple[np.ndarray, np.ndarray, list]:
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


def check_categories(content: dict, path: Path, classes: Sequence[str] | None) -> list[int]:
    """Check the categories and return their ids; see :func:`check_annotations`.

    Raises:
        UserError: a category without id or name, two of the same name, or names that are not the config's, in its
            order.
    """
    categories = Table(path, content, "categories")
    if not categories.rows:
        raise UserError(f"annotation file {categories.path} has no categories")
    ids = categories.ids("id", unique=True)
    names = categories.column("name", NAME, "a name")
    counts = Counter(names)
    categories.refuse((counts[name] > 1 for name in names), lambda row: f"shares the name {row['name']!r} with another")
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
                "both must list them in the same order"
            )
    return ids


def class_names(classes: str | Sequence[str]) -> tuple[str, ...]:
    """The class names of a config, given as names or as a text file with one name per line.

    Raises:
        UserError: any other string, which mmdet would read letter by letter; no names; a name given twice.
    """
    given = classes
    if isinstance(classes, str):
        if not Path(classes).is_file():
            raise UserError(
                f"classes {classes!r} is a single string and not a file of class names; for one class write "
                f"({classes!r},), with a comma"
            )
        classes = Path(classes).read_text(encoding="utf-8", errors="replace").splitlines()
    names = tuple(classes) if isinstance(classes, Iterable) else ()
    bad = [name for name in names if not isinstance(name, str)]
    if bad or not names:
        raise UserError(f"classes must be the names of one class or more, got {short(bad[0] if bad else given)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"classes has {twice[0]!r} {names.count(twice[0])} times among its {len(names)}: list it once")
    return names
