"""A model as one folder, of ``config.py``, ``model.safetensors`` and ``README.md``, which may stand for both files."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG, WEIGHTS, CARD = "config.py", "model.safetensors", "README.md"


def within(path: str | Path, name: str) -> Path:
    """The file of this name, if the path is a folder; else the path."""
    path = Path(path).expanduser()
    return path / name if path.is_dir() else path


def read_safetensors(path: Path) -> dict:
    """Weights and ``meta`` of a file, as a checkpoint has them.

    Raises:
        ValueError: not a whole file of safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        dataset = json.loads(meta.get("dataset_meta", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(str(error)) from error
    return dict(state_dict=weights, meta=dict(dataset_meta=dataset) if dataset else {})
