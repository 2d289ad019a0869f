"""Names of what is written about images: by an image's whole path, and none is given twice."""

import hashlib
import os
import unicodedata
from pathlib import Path
from typing import Any

PICTURES = (".jpg", ".jpeg", ".png")
"""Formats in which the picture of an image is written too; of others it becomes a PNG."""
MAX_BYTES = 200
"""Of a file's name: file systems end at 255, and what writes pictures may add a step and an ending."""


def below(path: str, folder: str | None) -> Path:
    """The path of an image below ``folder``; its whole path without the root where it lies elsewhere."""
    _, _, address = path.partition("://")
    where = Path(address or os.path.abspath(path))
    if folder is not None and not address:
        try:
            return where.relative_to(os.path.abspath(folder))
        except ValueError:
            pass
    return Path(*(part for part in where.parts if part not in (where.anchor, "..")))


def as_picture(path: Path) -> Path:
    """The name of an image's picture: its own, or with ``.png`` behind it where the format is not one of pictures."""
    return path if path.suffix.lower() in PICTURES else path.with_name(path.name + ".png")


def common_folder(folders: list[str]) -> str | None:
    """The deepest folder that has all of these below it; None for none, or on several drives."""
    try:
        return os.path.commonpath([os.path.abspath(folder) for folder in folders])
    except ValueError:
        return None


def image_folder(dataset: Any) -> str | None:
    """The folder below which a data set has its images, also one that wraps others; None where it does not say."""
    inner = getattr(dataset, "datasets", None) or [d for d in [getattr(dataset, "dataset", None)] if d is not None]
    if inner:
        folders = [image_folder(d) for d in inner]
        return None if None in folders else common_folder(folders)
    prefix = getattr(dataset, "data_prefix", None) or {}
    folder = prefix.get("img") or prefix.get("img_path") or getattr(dataset, "data_root", None)
    return None if not folder or "://" in folder else folder


class OutputNames:
    """Gives each file a name of its own.

    Names that differ only in case or in how Unicode writes an accent are one, as they are to some file systems.
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
    """A part of a path, cut with a checksum behind it where it is too long for a file's name."""
    if len(os.fsencode(part)) <= MAX_BYTES:
        return part
    stem, dot, ending = part.rpartition(".")
    ending = dot + ending if 0 < len(os.fsencode(ending)) <= 8 and stem else ""
    start = part[: len(part) - len(ending)]
    while len(os.fsencode(start)) > MAX_BYTES - 16:
        start = start[:-1]
    return f"{start}-{hashlib.sha256(os.fsencode(part)).hexdigest()[:8]}{ending}"
