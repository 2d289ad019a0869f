"""Reading checkpoints safely, writing them whole, and saying what is wrong with one that does not fit."""

import io
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from mmdet_lors.errors import UserError, first_line

from .model_folder import WEIGHTS, read_safetensors, within
from .whole_files import with_checksums, write_whole


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


ARCHIVE_ERRORS = "PytorchStreamReader", "inline_container", "hasRecord"
"""What torch's errors about the archive itself have in them; others are about its content, or memory."""


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


def read_checkpoint(path: str | Path, mmap: bool = False, map_location: Any = "cpu") -> dict:
    """Load a checkpoint with torch's safe loader, or a file of safetensors.

    Args:
        path: the file, or a folder that :mod:`~mmdet_lors.engine.checkpoint.model_folder` describes.
        mmap: map the file instead of reading it, so that what is not used (an optimizer's state) is never touched; its
            checksums are not looked at.
        map_location: as torch's.

    Raises:
        Damaged: a file that is cut short, does not match its checksums or is not a checkpoint.
        UserError: no such file, or one that holds objects which the safe loader refuses.
    """
    path = within(path, WEIGHTS)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    allow_mmengine_objects()  # Again: a loader that allows them for a while takes them off the list afterwards.
    is_archive = whole = False
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        with path.open("rb") as file:
            is_archive = zipfile.is_zipfile(file)
            if is_archive and not mmap:
                _check_archive(file)
            whole = is_archive
            file.seek(0)
            mmap &= is_archive
            checkpoint = torch.load(path if mmap else file, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise (UserError if whole else Damaged)(not_safe(path, error)) from error
    except Exception as error:  # Whatever damaged bytes lead to: there is no common class.
        if whole and not any(sign in str(error) for sign in ARCHIVE_ERRORS):
            raise UserError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
        known = is_archive or path.suffix == ".safetensors" or isinstance(error, OSError)
        reason = first_line(error) if known else "no end of a zip archive"
        raise Damaged(
            f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read: it is cut short, damaged or not a "
            f"checkpoint ({reason}); copy it again, or use another one"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def not_safe(path: str | Path, error: pickle.UnpicklingError) -> str:
    """The message about a file that torch's safe loader refuses, without its advice to load it all the same."""
    cause = (str(error).partition("\n\nCheck the documentation")[0].splitlines() or ["unreadable"])[-1]
    cause = cause.strip().removeprefix("WeightsUnpickler error: ").partition(". ")[0]
    return f"checkpoint {path} is not a checkpoint or holds objects that are not safe to load: {cause}"


def _check_archive(file: BinaryIO) -> None:
    """What torch itself passes over: the CRC-32 of each record, and marks of folders, which it leaves empty.

    Where all are 0, torch was told to write none.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        broken = next((record.filename for record in records if record.external_attr & 0x10), None)
        if any(record.CRC for record in records):
            broken = broken or archive.testzip()
    if broken:
        raise zipfile.BadZipFile(f"{broken} does not match its checksum")


def write_checkpoint(checkpoint: Mapping, path: Path) -> None:
    """Write with checksums, to a file beside ``path`` that is then renamed: ``path`` is whole or untouched.

    Raises:
        UserError: the file cannot be written.
    """
    with io.BytesIO() as buffer:
        try:
            with with_checksums():
                torch.save(checkpoint, buffer)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be written: {first_line(error)}") from error
        with buffer.getbuffer() as data:
            write_whole(path, data, with_time=True)


def check_fit(model: nn.Module, checkpoint: Mapping, path: str | Path, partly: bool = False) -> None:
    """Refuse a checkpoint whose weights are not exactly those that the model loads, or not finite.

    Args:
        model: only names and shapes of its weights are read. A layer that also loads what it was made from, as a
            low-rank one does, says so by a method ``loads_instead()``: names of its own weights, and name -> shape of
            what may come in their place.
        checkpoint: what :func:`read_checkpoint` returned.
        path: its file, for messages.
        partly: one weight that fits is enough, as for fine-tuning a model with other classes.

    Raises:
        UserError: values that are not finite; or how many keys are missing, unexpected or of another shape, and the
            first ones.
    """
    theirs: Mapping[str, Tensor] = checkpoint.get("state_dict", checkpoint)
    theirs = {k.removeprefix("module."): v for k, v in theirs.items()}
    for key, value in theirs.items():
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise UserError(f"checkpoint {path}: {key} holds values that are not finite")
    ours = _loaded_shapes(model, theirs)
    if partly and any(k in theirs and tuple(theirs[k].shape) == shape for k, shape in ours.items()):
        return
    problems = {
        "missing": [k for k in ours if k not in theirs],
        "unexpected": [k for k in theirs if k not in ours],
        "of another shape": [
            f"{k} {tuple(theirs[k].shape)} instead of {shape}"
            for k, shape in ours.items()
            if k in theirs and tuple(theirs[k].shape) != shape
        ],
    }
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise UserError(f"checkpoint {path} is of another architecture: keys {'; '.join(found)}")


def _loaded_shapes(model: nn.Module, given: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights that the model loads from a file with these names."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "loads_instead"):
            prefix = f"{name}." if name else ""
            own, others = module.loads_instead()
            if not any(prefix + k in given for k in own) and all(prefix + k in given for k in others):
                for k in own:
                    del shapes[prefix + k]
                shapes |= {prefix + k: tuple(shape) for k, shape in others.items()}
    return shapes
