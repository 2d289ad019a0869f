"""The forms in which an image can be given, and their conversion to what detectors read: (H, W, 3), BGR, uint8."""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from PIL import Image, ImageOps
from torch import Tensor

from mmdet_lors.datasets.exif import UNTURNED
from mmdet_lors.errors import UserError

Source = str | os.PathLike | bytes | bytearray | memoryview | np.ndarray | Image.Image
"""An image; docs/inference.md has a table of what is accepted and by which rule."""

ONE = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Image.Image, Tensor, dict, io.IOBase)
"""Types that are a single input, usable or not, although some of them can be iterated over."""
EIGHT_BITS = (b"\xff\xd8", b"BM", b"RIFF", b"GIF8")
"""The first bytes of the formats with at most 8 bits per value: JPEG, BMP, WebP, GIF."""
PNG = b"\x89PNG\r\n\x1a\n"
FULL_16_BITS = 1 << 15
XMP = ("xmp", "XML:com.adobe.xmp")
MAX_PIXELS = 40_000_000
"""Most pixels of a file that another person sends: a small file may unpack to a huge picture."""

_pillow = Lock()
"""Pillow reads a file's pixels when they are first needed; two threads must not do so at once."""


def each(inputs: Any) -> Iterable:
    """The inputs one by one: the items of a list, a tuple, a generator or a video, or a single input itself.

    Raises:
        UserError: the input is neither an image nor several.
    """
    if isinstance(inputs, ONE):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise _refused(inputs)
    return inputs


def path_of(source: Any) -> str | None:
    """The path of an image that is given by its path, else None."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else None


def name_of(source: Any) -> str:
    """An input as messages name it."""
    if (path := path_of(source)) is not None:
        return path
    if isinstance(source, np.ndarray):
        return f"array of shape {source.shape} and type {source.dtype}"
    if isinstance(source, Image.Image):
        return f"PIL image of mode {source.mode} and {source.width} x {source.height} pixels"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image file in memory ({len(source)} bytes)"
    return f"input of type {type(source).__name__}"


def check_pixels(content: bytes, name: str) -> None:
    """Look at the header of an image file that another person sent, before it is decoded.

    Raises:
        UserError: the file is not an image, or has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as header:
            width, height = header.size
        too_large = width * height > MAX_PIXELS
    except Image.DecompressionBombError:
        too_large = True
    except Exception as error:  # decoders raise whatever they like on broken files
        raise UserError(f"{name} cannot be read as an image") from error
    if too_large:
        raise UserError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels")


@dataclass(frozen=True)
class Reader:
    """Reads an image in any form, as a pipeline's ``LoadImageFromFile`` reads its file.

    Args:
        color_type, imdecode_backend, backend_args: as in ``LoadImageFromFile``.
    """

    color_type: str = "color"
    imdecode_backend: str = "cv2"
    backend_args: dict | None = None

    @classmethod
    def of(cls, loader: LoadImageFromFile) -> "Reader":
        """The reader that reads as this step of a pipeline does."""
        return cls(loader.color_type, loader.imdecode_backend, loader.backend_args)

    @property
    def turns(self) -> bool:
        """Whether pictures are turned by their EXIF data."""
        return self.color_type not in UNTURNED

    @property
    def colours(self) -> "Reader":
        """A reader of the same frame that keeps colours, for drawing."""
        return replace(self, color_type="color" if self.turns else "color_ignore_orientation")

    def __call__(self, source: Source) -> np.ndarray:
        """The pixels, (H, W, 3), BGR, uint8, or in the form that ``color_type`` asks for if that is not colours.

        Raises:
            UserError: the source is not an image, or the range of its values is unknown.
        """
        if (path := path_of(source)) is not None:
            try:
                content = fileio.get(path, backend_args=self.backend_args)
            except FileNotFoundError as error:
                raise UserError(f"{path} does not exist") from error
            except MemoryError:
                raise
            except Exception as error:  # each back end has its own
                raise UserError(f"{path} cannot be read as an image") from error
            return self._decoded(content, path)
        if isinstance(source, bytes | bytearray | memoryview):
            return self._decoded(bytes(source), name_of(source))
        if isinstance(source, Image.Image):
            return self._as_wanted(_from_pillow(source, self.turns))
        if isinstance(source, np.ndarray):
            return self._as_wanted(_bgr(source, name_of(source)))
        raise _refused(source)

    def _as_wanted(self, image: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if self.color_type.startswith("grayscale") else image

    def _decoded(self, content: bytes, name: str) -> np.ndarray:
        deep = _more_than_8_bits(content) if "unchanged" not in self.color_type else None
        if deep is not None:
            deep = _uint8(deep, name)  # refuses what would be read too dark
        try:
            image = mmcv.imfrombytes(content, self.color_type, backend=self.imdecode_backend)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they like on broken files
            raise UserError(f"{name} cannot be read as an image") from error
        if image is None and deep is not None:
            return self._as_wanted(_bgr(deep, name))
        if image is None:
            raise UserError(f"{name} cannot be read as an image")
        return image


def _more_than_8_bits(content: bytes) -> np.ndarray | None:
    """The values of a file with more than 8 bits per value, unconverted; None for any other file."""
    if content.startswith(EIGHT_BITS) or (content.startswith(PNG) and content[24:25] != b"\x10"):
        return None
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    return None if image is None or image.dtype == np.uint8 else image


def _uint8(array: np.ndarray, name: str) -> np.ndarray:
    """Values as uint8, by the rules of docs/inference.md.

    Raises:
        UserError: the range of the values is unknown.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise UserError(f"{name} does not hold numbers from 0 to 255")
    low, high = array.min(), array.max()
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        if 0 < high < FULL_16_BITS:
            bits = int(high).bit_length()
            raise UserError(
                f"{name} has {high} as its largest value, so it uses {bits} of its 16 bits and would be read too dark; "
                f"scale it to 8 bits first, for example with (values >> {max(bits - 8, 0)}).astype('uint8')"
            )
        return (array >> 8).astype(np.uint8)
    if 0 < high <= 1 and low >= 0:
        raise UserError(
            f"{name} has values from {low:g} to {high:g}, not 0 to 255; convert it to uint8 first, for example with "
            "(values * 255).round().astype('uint8')"
        )
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255 or (array % 1).any():
        raise UserError(
            f"{name} has values from {low:g} to {high:g}, which are not whole numbers from 0 to 255; convert it to "
            "uint8 first"
        )
    return array.astype(np.uint8)


def _bgr(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3) in BGR or (H, W, 4) in BGRA -> (H, W, 3), BGR, uint8, contiguous.

    Raises:
        UserError: another shape, or values that are not pixels.
    """
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        remedy = ""
        if array.ndim == 4:
            remedy = ": give the images of a batch one by one, list(array)"
        elif array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.size:
            remedy = ": array.transpose(1, 2, 0) has the channels last"
        raise UserError(f"{name} is not an image, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4){remedy}")
    array = _uint8(np.asarray(array), name)
    if array.ndim == 2 or array.shape[2] == 1:
        array = np.broadcast_to(array.reshape(*array.shape[:2], 1), (*array.shape[:2], 3))
    return np.ascontiguousarray(array[..., :3])


def _from_pillow(image: Image.Image, turn: bool) -> np.ndarray:
    name = name_of(image)
    try:
        with _pillow:
            image = image.copy()
        if turn:
            for key in XMP:  # Pillow turns images by XMP, OpenCV does not
                image.info.pop(key, None)
            image = ImageOps.exif_transpose(image)
        if image.mode in ("1", "F") or image.mode.startswith("I"):
            return _bgr(np.asarray(image), name)
        return _bgr(np.asarray(image.convert("RGB"))[..., ::-1], name)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # a file that is broken or closed
        raise UserError(f"{name} cannot be read as an image") from error


def _refused(source: Any) -> UserError:
    taken = "a path, the bytes of an image file, a PIL image or an array (H, W, 3), BGR, uint8"
    remedy = {
        Tensor: f"an image can be {taken}, such as tensor.permute(1, 2, 0).numpy()",
        io.IOBase: "give the file's content, file.read()",
    }
    for kind, text in remedy.items():
        if isinstance(source, kind):
            return UserError(f"{name_of(source)} cannot be read as an image: {text}")
    return UserError(f"{name_of(source)} cannot be read as an image, which is {taken}, or a list of these")
