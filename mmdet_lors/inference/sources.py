"""Turns the user's inputs into a list of images or one video, and says where the picture of each image is written."""

import os
from collections.abc import Sequence
from pathlib import Path

from mmdet.apis.det_inferencer import IMG_EXTENSIONS

from mmdet_lors.errors import UserError
from mmdet_lors.visualization.output_names import OutputNames, as_picture, below, common_folder

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")


def is_video(path: Path) -> bool:
    """Whether the file's name is that of a video."""
    return path.suffix.lower() in VIDEO_EXTENSIONS


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS


def images_in(folder: str | os.PathLike) -> list[str]:
    """The images directly in a folder, in the order of their names.

    Raises:
        UserError: there are none.
    """
    found = sorted(str(p) for p in Path(folder).iterdir() if _is_image(p) and p.is_file())
    if not found:
        raise UserError(f"folder {folder} has no images ({', '.join(IMG_EXTENSIONS)})")
    return found


def find_sources(inputs: Sequence[str]) -> tuple[list[str], str | None]:
    """The images, each once, and the video; a video must be the only input.

    A folder stands for the images directly in it, in the order of their names.

    Raises:
        UserError: an input that does not exist, a folder without images, a file whose name is neither that of an image
            nor of a video, a video beside other inputs.
    """
    images: dict[str, str] = {}  # by absolute path: each once, however it is written
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            for image in images_in(name):
                images.setdefault(os.path.abspath(image), image)
        elif not path.is_file():
            raise UserError(f"input {name} does not exist")
        elif is_video(path):
            if len(inputs) > 1:
                raise UserError(f"input {name} is a video: give it as the only input")
            return [], name
        elif _is_image(path):
            images.setdefault(os.path.abspath(name), name)
        else:
            raise UserError(
                f"input {name} is neither an image ({', '.join(IMG_EXTENSIONS)}) "
                f"nor a video ({', '.join(VIDEO_EXTENSIONS)})"
            )
    return list(images.values()), None


def picture_paths(images: Sequence[str], out: Path) -> dict[str, Path]:
    """Image -> its picture's file below ``out``, named by its path below the folder that all images have in common.

    Raises:
        UserError: a picture would overwrite an image.
    """
    common = common_folder([os.path.dirname(image) for image in images])
    names, read = OutputNames(), {Path(image).resolve(): image for image in images}
    paths = {image: out / names.take(as_picture(below(image, common))) for image in images}
    for target in paths.values():
        if (source := read.get(target.resolve())) is not None:
            check_not_input(target, source)
    return paths


def check_not_input(target: Path, source: str) -> None:
    """Refuse to write over an input.

    Raises:
        UserError: both are the same file.
    """
    if target.resolve() == Path(source).resolve():
        raise UserError(f"--out {target.parent} would overwrite {source}: give another folder")
