"""Where the host waits for the GPU: every synchronising call, by the line of this project that led to it."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import ROOT

HERE = Path(__file__).parent
MESSAGE = "called a synchronizing CUDA operation"


def place(stack: list[traceback.FrameSummary]) -> str:
    """The innermost line of the project outside this folder, and the innermost of all if that is another."""
    frames = [f for f in stack if Path(f.filename).parent != HERE and Path(f.filename).name != "warnings.py"]
    frames = [f for f in frames if f.name != "__torch_function__"]  # through which every call passes
    ours = [f for f in frames if ROOT in Path(f.filename).parents and ".venv" not in f.filename]
    named = [_name(frames[-1])] if frames else []
    if ours:
        named = [_name(ours[-1]), *(named if frames[-1] is not ours[-1] else [])]
    return " > ".join(named)


def _name(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    short = path.relative_to(ROOT) if ROOT in path.parents else Path(*path.parts[-3:])
    return f"{short}:{frame.lineno}"


@contextmanager
def counted() -> Iterator[Counter]:
    """Count the waits inside, by place."""
    found: Counter = Counter()

    def note(message, *_, **__) -> None:
        if MESSAGE in str(message):
            found[place(traceback.extract_stack()[:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
