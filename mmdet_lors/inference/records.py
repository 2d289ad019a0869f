"""Results as lines of JSON: appended while a run goes on, which can be continued, and read without keeping them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mmdet_lors.engine.checkpoint.whole_files import write_whole
from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json


class Records:
    """A run's results, ``predictions.jsonl``: a line for each image or frame, with ``boxes``, or ``error``, a reason.

    Args:
        folder: where the file is; it is made with the first line.
        run: what decides the results, by name, as JSON holds it. A run continues only one of which this is equal.
    """

    def __init__(self, folder: Path, run: dict) -> None:
        self.path, self._run_file = folder / "predictions.jsonl", folder / "predictions.run.json"
        self._run = json.loads(to_json(run))
        self._file: TextIO | None = None

    def begin(self, resume: bool) -> None:
        """Look at what is there, before anything is written.

        Raises:
            UserError: results of another run, or of any without ``resume``; a file that is no such results.
        """
        if not self.path.exists():
            return
        if not resume:
            raise UserError(f"{self.path} has results: go on with --resume, or give another --out")
        before = json.loads(self._run_file.read_text()) if self._run_file.exists() else {}
        for name, value in self._run.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.path} is of another run, with {name} {before.get(name)} instead of {value}: "
                    "give another --out"
                )

    def add(self, row: dict) -> None:
        """Append a result; it is in the file when this returns."""
        if self._file is None:
            write_whole(self._run_file, to_json(self._run, indent=1).encode())
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
            os.truncate(self.path, max((end for _, end in _lines(self.path)), default=0))  # a torn line
        self._file.write(to_json(row) + "\n")

    def rows(self) -> Iterator[dict]:
        """The results so far, one by one.

        Raises:
            UserError: a line that is no result.
        """
        for line, _ in _lines(self.path) if self.path.exists() else ():
            yield _row(line, self.path)


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Each line with the place where it ends; not one that a killed process left unfinished."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            if line.endswith(b"\n"):
                yield line, end


def _row(line: bytes, path: Path) -> dict:
    try:
        row = json.loads(line)
        if {"image", "frame"} & row.keys() and {"boxes", "error"} & row.keys():
            return row
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} has a line that is no result: {line[:60]!r}; give another --out")


@contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """A file to write a new ``path`` into, which takes its place at the end; after an error nothing has changed."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
