"""Arguments that several tools take, checked in one way."""

import re
from pathlib import Path

from mmdet_lors.errors import UserError

PICTURES = (".png", ".pdf", ".svg", ".jpg")
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


def check_writable(option: str, path: Path, formats: tuple[str, ...] = PICTURES) -> None:
    """Refuse a file that could not be written, before the work is done.

    Args:
        option: how the command line names it.
        path: of the file.
        formats: endings that it may have; all if there are none.

    Raises:
        UserError: another ending, a folder, or a file in a folder that does not exist.
    """
    if formats and path.suffix not in formats:
        raise UserError(f"{option} {path}: must end with {' or '.join(formats)}")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{option} {path}: must be a file in a folder that exists")


def width_and_height(option: str, text: str, smallest: int = 1, multiple: int = 1) -> tuple[int, int]:
    """'1280x800' -> (1280, 800).

    Raises:
        UserError: anything else, a side below ``smallest``, or one that is not a multiple of ``multiple``.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(size) < smallest or any(side % multiple for side in size):
        limits = f"multiples of {multiple}" if multiple > 1 else f"{smallest} or more"
        raise UserError(f"{option} {text!r} must be WIDTHxHEIGHT in pixels, both {limits}, such as 1280x800")
    return size


def quantity(option: str, text: str, whole: float) -> float:
    """'30M' -> 30e6, '60%' -> 0.6 of the whole.

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(k|M|G|%|)", text)
    if match is None:
        raise UserError(f"{option} {text!r} must be a number, such as 30M, 900k or 60%")
    return float(match[1]) * (whole / 100 if match[2] == "%" else UNITS[match[2]])
