"""Every checkpoint that mmengine loads goes through torch's safe loader, wherever it comes from."""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_lors.errors import UserError

from .reading import not_safe, read_checkpoint

FORCE_SAFE, FORCE_UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Iterator[None]:
    """Whoever calls ``torch.load`` in here gets the safe loader, whatever it asks for and whatever the user has set."""
    before = {name: os.environ.pop(name, None) for name in (FORCE_SAFE, FORCE_UNSAFE)}
    os.environ[FORCE_SAFE] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def safely(load: Callable[..., Any]) -> Callable[..., Any]:
    """One of mmengine's loaders, ``load(filename, map_location)``, that unpickles tensors and plain values alone.

    Two of mmengine's ways to run what is in a checkpoint are closed: its loader for web addresses switches torch's safe
    mode off, and ``Runner.resume`` executes the field ``meta.config``, which mmcv 1.x wrote and nothing else reads.

    Raises:
        UserError: the file is not a checkpoint, or holds objects that the safe loader refuses.
    """

    @wraps(load)
    def load_safely(filename: str, map_location: Any = None, **kwargs: Any) -> Any:
        try:
            with weights_only():
                checkpoint = load(filename, map_location=map_location, **kwargs)
        except pickle.UnpicklingError as error:
            raise UserError(not_safe(filename, error)) from error
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("meta"), dict):
            checkpoint["meta"].pop("config", None)
        return checkpoint

    load_safely.is_safe = True
    return load_safely


_handed_over: dict[str, dict] = {}


def hand_over(path: str, checkpoint: dict) -> None:
    """Let mmengine's next loading of this file return what was read from it already, and keep nothing of it then."""
    _handed_over.clear()
    _handed_over[path] = checkpoint


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """mmengine's loader of files, with our reader."""
    return _handed_over.pop(filename, None) or read_checkpoint(filename, map_location=map_location)


def make_mmengine_load_safely() -> None:
    """Replace every loader that mmengine has registered; a second call changes nothing."""
    for prefix, load in list(CheckpointLoader._schemes.items()):
        if not getattr(load, "is_safe", False):
            CheckpointLoader.register_scheme(prefix, safely(load if prefix else load_from_local), force=True)
