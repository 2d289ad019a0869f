"""Reading checkpoints safely, writing them whole, and saying what is wrong with one that does not fit."""

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from mmdet_lors.errors import UserError


def _history_method(owner: type, name: str) -> Callable:
    """What ``getattr`` may do in a checkpoint: name one of HistoryBuffer's statistics, which mmengine pickles so."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current", "statistics"):
        raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) is not safe to load")
    return getattr(owner, name)


def allow_mmengine_objects() -> None:
    """Let torch's safe loader accept what mmengine itself writes into a checkpoint, and nothing more.

    That is the log history (``HistoryBuffer``) and the numpy scalars and arrays in it. Without this, torch >= 2.6
    refuses to resume from or test mmengine's own checkpoints.
    """
    reconstruct_array, reconstruct_scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_method, "builtins.getattr"),
            np.ndarray,
            np.dtype,
            reconstruct_array,
            reconstruct_scalar,
            *dtypes,
        ]
    )


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict:
    """Load a checkpoint on the CPU with torch's safe loader.

    Args:
        path: the file.
        mmap: map the file instead of reading it, so that what is not used (an optimizer's state) is never touched.

    Raises:
        UserError: no such file, one that is cut short or no checkpoint, or one that holds objects which the safe
            loader refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"checkpoint {path} is no checkpoint or holds objects that are not safe to load: {reason}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read: it is cut short or no checkpoint"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return dict(checkpoint)


def write_checkpoint(checkpoint: Mapping, path: Path) -> None:
    """Write to a file beside ``path``, then rename it: ``path`` is whole or untouched.

    Raises:
        UserError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_fit(model: nn.Module, checkpoint: Mapping, path: str | Path, partly: bool = False) -> None:
    """Refuse a checkpoint whose weights are not exactly the model's.

    Args:
        model: only names and shapes of its weights are read.
        checkpoint: what :func:`read_checkpoint` returned.
        path: its file, for messages.
        partly: one weight that fits is enough, as for fine-tuning a model with other classes.

    Raises:
        UserError: how many keys are missing, unexpected or of another shape, and the first ones.
    """
    theirs: Mapping[str, Tensor] = checkpoint.get("state_dict", checkpoint)
    theirs = {k.removeprefix("module."): v for k, v in theirs.items()}
    ours = model.state_dict()
    if partly and any(k in theirs and theirs[k].shape == v.shape for k, v in ours.items()):
        return
    problems = {
        "missing": [k for k in ours if k not in theirs],
        "unexpected": [k for k in theirs if k not in ours],
        "of another shape": [
            f"{k} {tuple(theirs[k].shape)} instead of {tuple(v.shape)}"
            for k, v in ours.items()
            if k in theirs and theirs[k].shape != v.shape
        ],
    }
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise UserError(f"checkpoint {path} is of another architecture: keys {'; '.join(found)}")
