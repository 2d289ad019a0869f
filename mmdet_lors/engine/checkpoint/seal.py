"""A file is written whole or not at all, and a checkpoint carries its own checksum."""

import errno
import hashlib
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from mmdet_lors.errors import UserError

HEX = 64
"""Characters of a SHA-256."""
END = 22
"""Bytes of a zip archive's end record without comment; its last two are the comment's length."""
SEAL = re.compile(rb"mmdet_lors saved=(\d{10}\.\d{6}) sha256=([0-9a-f]{64})\Z")
SEAL_LENGTH = len("mmdet_lors saved=0000000000.000000 sha256=") + HEX


def _ends_without_comment(end: bytes) -> bool:
    return end[:4] == b"PK\x05\x06" and end[-2:] == b"\0\0"


def _sealed(data: memoryview) -> tuple[memoryview, bytes]:
    """What ``torch.save`` wrote, and its new end, together a file with a seal.

    The file is a zip archive, and an archive may end with a comment: the seal is that comment, so that every reader of
    zip files and of checkpoints goes on working, and the seal stays with the file wherever it is copied. It says when
    the file was written, and the SHA-256 of all bytes before the checksum itself.
    """
    if not _ends_without_comment(bytes(data[-END:])):
        return data, b""
    body = data[:-2]
    end = SEAL_LENGTH.to_bytes(2, "little") + f"mmdet_lors saved={time.time():.6f} sha256=".encode()
    digest = hashlib.sha256(body)
    digest.update(end)
    return body, end + digest.hexdigest().encode()


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write to a file beside ``path``, flush it to the disk, then rename it: ``path`` is new and whole, or untouched.

    Raises:
        UserError: the file cannot be written, such as on a full disk.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    size = sum(len(part) for part in parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or str(error).splitlines()[0]} ({_megabytes(size)} needed, "
            f"{_free_space(path.parent)} free); what was there is as it was"
        ) from error


def write_sealed(path: Path, data: bytes | memoryview) -> None:
    """:func:`write_whole` of what ``torch.save`` wrote, with a seal.

    Raises:
        UserError: as :func:`write_whole`.
    """
    write_whole(path, *_sealed(memoryview(data)))


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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _free_space(folder: Path) -> str:
    try:
        return _megabytes(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown amount"


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing into this folder."""
    for path in folder.glob(".*.pth.*.tmp"):
        path.unlink(missing_ok=True)


def _seal(path: Path) -> re.Match[bytes] | None:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL_LENGTH))
        return SEAL.search(file.read())


def saved_at(path: Path) -> float:
    """When a checkpoint was written, in seconds since 1970: by its seal, which copies keep, or by the file system."""
    seal = _seal(path)
    return float(seal[1]) if seal else path.stat().st_mtime


def breaks_its_seal(path: Path) -> bool:
    """Whether a file carries a checksum that is not its own; False without a checksum."""
    seal = _seal(path)
    if not seal:
        return False
    digest, left = hashlib.sha256(), path.stat().st_size - HEX
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest().encode() != seal[2]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. One that others wrote has no seal; its archive's CRCs are checked."""
    try:
        if breaks_its_seal(path):
            return "its bytes do not match its checksum"
        if _seal(path):
            return None
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            file.seek(-END, os.SEEK_END)
            if not _ends_without_comment(file.read()):
                return "its checksum is damaged"
            broken = archive.testzip()
            return f"{broken} in it does not match its checksum" if broken else None
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        return "it is cut short or no checkpoint"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


@register_backend("whole_file")
class WholeFileBackend(LocalBackend):
    """mmengine's access to local files, with :func:`write_sealed` for ``put``."""

    def __init__(self) -> None:
        super().__init__()
        self.postponed: list[Path] | None = None

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a checkpoint whole, with its checksum.

        Raises:
            UserError: as :func:`write_whole`.
        """
        write_sealed(Path(filepath), obj)

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
