"""Turns the user's inputs into a list of images or one video, and says where the picture of each image is written."""

import os
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from mmdet.apis.det_inferencer import IMG_EXTENSIONS

from mmdet_lors.datasets.annotations import read_annotations
from mmdet_lors.errors import UserError
from mmdet_lors.visualization.output_names import OutputNames, as_picture, below, common_folder

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")


def is_video(path: Path) -> bool:
    """Whether the file's name is that of a video."""
    return path.suffix.lower() in VIDEO_EXTENSIONS


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS


def images_in(folder: str | os.PathLike, without: Path | None = None) -> list[str]:
    """The images in a folder and in those below it, in the order of their paths.

    Args:
        folder: the folder.
        without: a folder below it to leave out, with what is in it.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    found, left_out = [], without and os.path.abspath(without)
    for where, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if os.path.abspath(os.path.join(where, name)) != left_out]
        found += [os.path.join(where, name) for name in files if _is_image(Path(name))]
    if not found:
        raise UserError(f"folder {folder} has no images ({', '.join(IMG_EXTENSIONS)})")
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read: {error.strerror}") from error


def find_sources(
    inputs: Sequence[str], images_dir: Path | None = None, out: Path | None = None
) -> tuple[list[str], str | None]:
    """The images, each once, and the video; a video must be the only input.

    An input is an image, a folder, a pattern such as ``a/**/*.jpg``, a text file with a path per line, a COCO JSON or a
    video. That the images of a text file or a JSON exist is not checked.

    Args:
        inputs: what the user gave.
        images_dir: the folder that paths in text files and JSONs start from; None for the file's own.
        out: a folder for results; images in it are none of the inputs, if it is below one.

    Raises:
        UserError: an input that does not exist, that has no images or is none of these, a video beside other inputs.
    """
    images: dict[str, str] = {}  # by absolute path: each once, however it is written
    for name in inputs:
        if is_video(Path(name)) and Path(name).is_file():
            if len(inputs) > 1:
                raise UserError(f"input {name} is a video: give it as the only input")
            return [], name
        for image in _images_of(name, images_dir, out):
            images.setdefault(os.path.abspath(image), image)
    return list(images.values()), None


def _images_of(name: str, images_dir: Path | None, out: Path | None) -> list[str]:
    path = Path(name)
    if path.is_dir():
        return images_in(name, out)
    if has_magic(name) and not path.exists():
        found = sorted(match for match in glob(name, recursive=True) if _is_image(Path(match)))
    elif not path.is_file():
        raise UserError(f"input {name} does not exist")
    elif _is_image(path):
        return [name]
    elif path.suffix.lower() in (".txt", ".json"):
        found = [os.path.join(images_dir or path.parent, image) for image in _listed(path)]
    else:
        raise UserError(
            f"input {name} is neither an image ({', '.join(IMG_EXTENSIONS)}), a list of images (.txt, .json) "
            f"nor a video ({', '.join(VIDEO_EXTENSIONS)})"
        )
    if not found:
        raise UserError(f"input {name} names no images")
    return found


def _listed(path: Path) -> Iterator[str]:
    """The paths in a text file, or in a COCO JSON."""
    if path.suffix.lower() == ".txt":
        try:
            yield from filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"input {path} cannot be read as text: {error}") from error
        return
    for place, row in enumerate(read_annotations(path)["images"]):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"input {path}: images[{place}] must have a file_name")
        yield row["file_name"]


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
