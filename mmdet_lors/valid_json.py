"""Valid JSON in all that this package and mmengine write: null in place of NaN and infinities."""

import json
from math import isfinite
from typing import Any

from mmengine.fileio import JsonHandler, register_handler
from mmengine.fileio.handlers.json_handler import set_default
from torch import Tensor


def to_json(value: Any, **settings: Any) -> str:
    """The text of a value, in which NaN and infinities, which JSON does not have, are null.

    Args:
        value: anything that JSON can hold, and numbers and arrays of numpy and torch.
        settings: those of ``json.dumps``.
    """
    settings = dict(dict(default=_plain), **settings, allow_nan=False)
    try:
        return json.dumps(value, **settings)
    except ValueError:
        return json.dumps(_finite(value), **settings)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key if not isinstance(key, float) or isfinite(key) else str(key): _finite(v) for key, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _finite(_plain(value))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else set_default(value)


@register_handler("json")
class ValidJsonHandler(JsonHandler):
    """mmengine's reader and writer of JSON files: its logs of scalars, its metrics, its results."""

    def dump_to_fileobj(self, obj: Any, file: Any, **settings: Any) -> None:
        """Write to an open file."""
        file.write(self.dump_to_str(obj, **settings))

    def dump_to_str(self, obj: Any, **settings: Any) -> str:
        """The text."""
        return to_json(obj, **settings)
