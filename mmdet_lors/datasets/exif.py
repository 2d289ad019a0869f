"""How a picture is meant to be turned, by its EXIF data."""

from pathlib import Path

from PIL import Image

ORIENTATION = 0x0112
"""EXIF's tag."""


def orientation(path: str | Path) -> int:
    """1 for a picture that is stored as it is shown, 2 to 8 for one that viewers mirror or turn (EXIF 2.3, 4.6.4 A).

    OpenCV, and so every tool of this project, turns a picture as it reads it: boxes are in the frame in which it is
    shown. Where the orientation is 5 to 8, width and height of the stored frame are exchanged.
    """
    with Image.open(path) as image:
        value = image.getexif().get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1
