"""Files that are written whole or not at all, and checkpoints that say when they were written."""

import errno
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.fileio import LocalBackend, register_backend

from mmdet_lors.errors import UserError, first_line

SAVED_AT = "archive/saved_at"
"""Record of a checkpoint, which is a zip archive, beside those of torch."""


def write_whole(path: Path, data: bytes | memoryview, with_time: bool = False) -> None:
    """Write to a file beside ``path``, flush it to the disk, then rename it: ``path`` is new and whole, or untouched.

    Args:
        path: the file.
        data: its content.
        with_time: it is what ``torch.save`` wrote, and gets a record with the time, which copies of the file keep.

    Raises:
        UserError: the file cannot be written, such as on a full disk.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("w+b") as file:
                file.write(data)
                if with_time:
                    with zipfile.ZipFile(file, "a") as archive:
                        archive.writestr(zipfile.ZipInfo(SAVED_AT), f"{time.time():.6f}")
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or first_line(error)} ({len(data) / 1e6:.1f} MB needed, "
            f"{_free_space(path.parent)} free); the previous file is unchanged"
        ) from error


@contextmanager
def with_checksums() -> Iterator[None]:
    """What ``torch.save`` writes in here has checksums, whatever the user has set."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def saved_at(path: Path) -> float:
    """When a checkpoint was written, in seconds since 1970: by its own record, or else by the file system."""
    try:
        with zipfile.ZipFile(path) as archive:
            before = re.match(rb"mmdet_lors saved=(\d+\.\d+) ", archive.comment)  # as mmdet_lors 0.1 wrote it
            return float(before[1] if before else archive.read(SAVED_AT))
    except Exception:  # Whatever damaged bytes lead to: there is no common class.
        return path.stat().st_mtime


def _flush_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut, where the system can: Windows opens no folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system, such as a network disk, that cannot
            raise
    finally:
        os.close(descriptor)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"
    except OSError:
        return "an unknown amount"


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing into this folder."""
    for path in folder.glob(".*.pth.*.tmp"):
        path.unlink(missing_ok=True)


@register_backend("whole_file")
class WholeFileBackend(LocalBackend):
    """mmengine's access to local files, with :func:`write_whole` for ``put``."""

    def __init__(self) -> None:
        super().__init__()
        self.postponed: list[Path] | None = None

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a checkpoint whole, with the time.

        Raises:
            UserError: as :func:`write_whole`.
        """
        write_whole(Path(filepath), obj, with_time=True)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file, or note it to be removed at the end of :meth:`removing_last`."""
        if self.postponed is None:
            super().remove(filepath)
        else:
            self.postponed.append(Path(filepath))

    @contextmanager
    def removing_last(self) -> Iterator[None]:
        """What is removed in here goes at the end, once what replaces it is on the disk; after an error it stays."""
        if self.postponed is not None:  # within another one
            yield
            return
        self.postponed = []
        try:
            yield
            for path in self.postponed:
                path.unlink(missing_ok=True)
        finally:
            self.postponed = None
