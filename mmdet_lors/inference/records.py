"""Results as lines of JSON: appended while a run goes on, which can be continued, and read without keeping them."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from mmdet_lors.engine.checkpoint.whole_files import write_whole
from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json


class Records:
    """A run's results, ``predictions.jsonl``: a line for each image or frame, with ``boxes``, or ``error``, a reason.

    Each of several processes appends to a file of its own, such as ``predictions.0.jsonl``, until :meth:`merge`.

    Args:
        folder: where the files are; it is made with the first line.
        run: what decides the results, by name, as JSON holds it. A run continues only one of which this is equal.
        rank: number of this process.
        world: how many processes there are.
    """

    def __init__(self, folder: Path, run: dict, rank: int = 0, world: int = 1) -> None:
        self.path, self._run_file = folder / "predictions.jsonl", folder / "predictions.run.json"
        self._own = self.path if world == 1 else folder / f"predictions.{rank}.jsonl"
        self._run = json.loads(to_json(run))
        self._file: TextIO | None = None

    def begin(self, resume: bool) -> None:
        """Look at what is there, before any process writes.

        Raises:
            UserError: results of another run, or of any without ``resume``.
        """
        if not (files := self._files()):
            return
        if not resume:
            raise UserError(f"{files[0]} has results: go on with --resume, or give another --out")
        before = json.loads(self._run_file.read_text()) if self._run_file.exists() else {}
        for name, value in self._run.items():
            if before.get(name) != value:
                raise UserError(
                    f"{files[0]} is of another run, with {name} {before.get(name)} instead of {value}: "
                    "give another --out"
                )

    def add(self, row: dict) -> None:
        """Append a result; it is in the file when this returns."""
        if self._file is None:
            write_whole(self._run_file, to_json(self._run, indent=1).encode())
            self._file = self._own.open("a", buffering=1, encoding="utf-8")
            os.truncate(self._own, sum(len(line) for line, _ in _lines(self._own)))  # without a torn line
        self._file.write(to_json(row) + "\n")

    def rows(self) -> Iterator[dict]:
        """The results so far of all processes, one by one.

        Raises:
            UserError: a line that is no result.
        """
        for path in self._files():
            for line, _ in _lines(path):
                yield _row(line, path)

    def merge(self, images: Iterable[str]) -> None:
        """Bring the results of all processes into one file, in the order of the images, each once.

        Raises:
            UserError: an image without a result.
        """
        if (files := self._files()) == [self.path]:
            return
        places: dict[str, tuple[int, int]] = {}
        for number, path in enumerate(files):
            for line, start in _lines(path):
                places.setdefault(_row(line, path)["image"], (number, start))
        with ExitStack() as stack:
            opened = [stack.enter_context(path.open("rb")) for path in files]
            merged = stack.enter_context(replaced(self.path))
            for image in images:
                if image not in places:
                    raise UserError(f"no process wrote a result of {image}: --out must be one folder for all machines")
                number, start = places[image]
                opened[number].seek(start)
                merged.write(opened[number].readline())
        for path in files:
            if path != self.path:
                path.unlink()

    def _files(self) -> list[Path]:
        parts = sorted(self.path.parent.glob("predictions.[0-9]*.jsonl"))
        return [self.path, *parts] if self.path.exists() else parts


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Each line with the place where it starts; not one that a killed process left unfinished."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line, start
            start += len(line)


def _row(line: bytes, path: Path) -> dict:
    try:
        row = json.loads(line)
        if {"image", "frame"} & row.keys() and {"boxes", "error"} & row.keys():
            return row
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} has a line that is no result: {line[:60]!r}; give another --out")


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write a new ``path`` into, which takes its place at the end; after an error nothing has changed."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
