"""Names of files written about images: made from an image's whole path, and never given twice."""

import hashlib
import os
import unicodedata
from pathlib import Path
from typing import Any

PICTURES = (".jpg", ".jpeg", ".png")
"""Formats that an image's picture keeps; for an image of any other format it is a PNG."""
MAX_BYTES = 200
"""Longest file name: file systems allow 255 bytes, and the writer of a picture may add a step and an ending."""


def below(path: str, folder: str | None) -> Path:
    """The path of an image below ``folder``; if it lies elsewhere, its whole path without the root."""
    _, _, address = path.partition("://")
    where = Path(address or os.path.abspath(path))
    if folder is not None and not address:
        try:
            return where.relative_to(os.path.abspath(folder))
        except ValueError:
            pass
    return Path(*(part for part in where.parts if part not in (where.anchor, "..")))


def as_picture(path: Path) -> Path:
    """The name of an image's picture: the image's own, with ``.png`` added if its format is not in ``PICTURES``."""
    return path if path.suffix.lower() in PICTURES else path.with_name(path.name + ".png")


def common_folder(folders: list[str]) -> str | None:
    """The deepest folder that contains all of these; None if there are none, or if they are on several drives."""
    try:
        return os.path.commonpath([os.path.abspath(folder) for folder in folders])
    except ValueError:
        return None


def image_folder(dataset: Any) -> str | None:
    """The folder that contains a data set's images, or those of the data sets it wraps; None if it is not stated."""
    inner = getattr(dataset, "datasets", None) or [d for d in [getattr(dataset, "dataset", None)] if d is not None]
    if inner:
        folders = [image_folder(d) for d in inner]
        return None if None in folders else common_folder(folders)
    prefix = getattr(dataset, "data_prefix", None) or {}
    folder = prefix.get("img") or prefix.get("img_path") or getattr(dataset, "data_root", None)
    return None if not folder or "://" in folder else folder


class OutputNames:
    """Gives each file a name of its own.

    Names that differ only in case or in how Unicode writes an accent count as equal, as on some file systems.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, *wanted: Path) -> Path:
        """The first of the wanted names that is free, or else the last one with a number: ``a-2.png``."""
        wanted = [Path(*(_short(part) for part in path.parts)) for path in wanted]
        last, number = wanted[-1], 2
        for name in wanted:
            if self._free(name):
                break
        else:
            while not self._free(name := last.with_name(f"{last.stem}-{number}{last.suffix}")):
                number += 1
        self._taken.add(_key(name))
        return name

    def _free(self, name: Path) -> bool:
        return _key(name) not in self._taken


def _key(name: Path) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(name)).casefold())


def _short(part: str) -> str:
    """A part of a path; one that is too long for a file name is cut and ends with a checksum."""
    if len(os.fsencode(part)) <= MAX_BYTES:
        return part
    stem, dot, ending = part.rpartition(".")
    ending = dot + ending if 0 < len(os.fsencode(ending)) <= 8 and stem else ""
    start = part[: len(part) - len(ending)]
    while len(os.fsencode(start)) > MAX_BYTES - 16:
        start = start[:-1]
    return f"{start}-{hashlib.sha256(os.fsencode(part)).hexdigest()[:8]}{ending}"
