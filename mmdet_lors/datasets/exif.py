"""Which frame the boxes of a picture are in if its EXIF data tells viewers to turn it.

One rule for training, validation, test, inference, the web page and Python: boxes are in the frame in which the
pipeline loads the picture. mmcv's reader turns it as viewers do, so that is the frame in which it is *shown*; with
``LoadImageFromFile(color_type="color_ignore_orientation")`` it is the one in which it is *stored*.

Sizes reveal a quarter turn: an annotation that has the width and height of the other frame is refused. They do not
reveal half a turn or a mirrored picture: these are refused as well, unless the config states the frame, by the data
set's field ``exif="shown"`` or by loading the picture as it is stored.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from mmdet_lors.errors import UserError

ORIENTATION = 0x0112
"""EXIF's tag."""
SHOWN, STORED = "shown", "stored"
UNTURNED = ("unchanged", "color_ignore_orientation", "grayscale_ignore_orientation")
"""``color_type`` s of ``LoadImageFromFile`` with which a picture is loaded as it is stored."""


def orientation(path: str | Path) -> int:
    """1 for a picture that is stored as it is shown, 2 to 8 for one that viewers mirror or turn (EXIF 2.3, 4.6.4 A).

    OpenCV, and so every tool of this project, turns a picture as it reads it: boxes are in the frame in which it is
    shown. If the orientation is 5 to 8, width and height of the stored frame are exchanged.
    """
    return _header(path)[0]


def check_frame(path: str | Path, width: int, height: int, frame: str | None = None) -> None:
    """Refuse an annotation that is not, or may not be, in the frame in which the picture is loaded.

    A file that cannot be read as a picture passes: loading it raises an error of its own.

    Args:
        path: the picture.
        width, height: what its annotation says, in pixels.
        frame: 'shown' or 'stored', if the config states it; see :func:`frame_of`.

    Raises:
        UserError: the frame is another one or cannot be determined; names the file and its EXIF orientation.
    """
    if problem := frame_problem(path, width, height, frame):
        raise UserError(f"image {path} {problem}")


def frame_problem(file: str | Path | BinaryIO, width: int, height: int, frame: str | None = None) -> str | None:
    """What :func:`check_frame` reports, without the file's name; None if nothing is wrong."""
    turn, shown, stored, is_tiff = _header(file)
    if turn == 1:
        return None
    if frame == STORED and is_tiff:
        return f"has EXIF orientation {turn}, by which OpenCV turns a TIFF in any case: convert it to another format"
    loaded, other = (stored, shown) if frame == STORED else (shown, stored)
    said = (width, height)
    if said == other != loaded:
        return (
            f"is turned by its EXIF orientation {turn}: it is loaded with {_size(loaded)} pixels, but its annotation "
            f"says {_size(said)}, those of the picture as {SHOWN if frame == STORED else STORED}; annotate the picture "
            f"as loaded, or {_LOAD_SHOWN if frame == STORED else _LOAD_STORED}"
        )
    if said == loaded == other and frame is None:
        return (
            f"is turned or mirrored by its EXIF orientation {turn}, and its size does not show whether boxes belong to "
            f"the picture as shown or as stored: state exif='shown' in the data set's config, or {_LOAD_STORED}"
        )
    return None  # a size that is neither: the loader compares sizes for all pictures


_LOAD_STORED = "load it as it is stored with LoadImageFromFile(color_type='color_ignore_orientation')"
_LOAD_SHOWN = "load it as it is shown: leave color_type out of LoadImageFromFile"


def frame_of(pipeline: Sequence[Any], exif: str | None = None) -> str | None:
    """The frame that the config states: 'stored' if the pipeline does not turn pictures, else ``exif``, or None.

    Args:
        pipeline: steps or their configs.
        exif: the data set's field of that name.

    Raises:
        UserError: ``exif`` is neither 'shown' nor 'stored', or is not what the pipeline does.
    """
    if exif not in (None, SHOWN, STORED):
        raise UserError(f"exif must be 'shown', 'stored' or left out, got {exif!r}")
    kinds = (s.get("color_type") if isinstance(s, dict) else getattr(s, "color_type", None) for s in pipeline)
    stored = next((kind for kind in kinds if kind is not None), None) in UNTURNED
    if exif is not None and (exif == STORED) != stored:
        raise UserError(
            f"exif={exif!r} is not how the pipeline loads pictures: {_LOAD_SHOWN if stored else _LOAD_STORED}"
        )
    return STORED if stored else exif


def _header(file: str | Path | BinaryIO) -> tuple[int, tuple[int, int], tuple[int, int], bool]:
    """Orientation, (width, height) as shown and as stored, and whether it is a TIFF."""
    try:
        with Image.open(file) as image:
            value, size, is_tiff = _tag(image), image.size, image.format == "TIFF"
    except Exception:  # Pillow raises whatever its parsers meet
        return 1, (0, 0), (0, 0), False
    if value not in range(2, 9):
        return 1, size, size, is_tiff
    exchanged = size[::-1] if value > 4 else size
    # For a TIFF, Pillow gives the size as shown.
    return int(value), *((size, exchanged) if is_tiff else (exchanged, size)), is_tiff


def _tag(image: Image.Image) -> Any:
    # Not getexif(), which falls back on XMP, which OpenCV ignores.
    if image.format == "TIFF":
        return image.tag_v2.get(ORIENTATION, 1)
    exif = Image.Exif()
    exif.load(image.info.get("exif"))
    return exif.get(ORIENTATION, 1)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
