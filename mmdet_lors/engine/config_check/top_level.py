"""Checks a config's top-level keys: those that are read, and by what."""

import re
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from mmdet_lors.errors import UserError

from .signatures import nearest

RUNNER = {
    "model",
    "work_dir",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "train_cfg",
    "val_cfg",
    "test_cfg",
    "auto_scale_lr",
    "optim_wrapper",
    "param_scheduler",
    "val_evaluator",
    "test_evaluator",
    "default_hooks",
    "custom_hooks",
    "data_preprocessor",
    "load_from",
    "resume",
    "launcher",
    "env_cfg",
    "log_processor",
    "log_level",
    "visualizer",
    "default_scope",
    "randomness",
    "experiment_name",
    "runner_type",
    "model_wrapper_cfg",
    "sync_bn",
    "find_unused_parameters",
    "compile",
    "activation_checkpointing",
    "efficient_conv_bn_eval",
    "strategy",
}
"""Read by mmengine's Runner and FlexibleRunner."""

TOOLS = {"custom_imports", "tta_model", "tta_pipeline", "device", "deprecation", "_deprecation_"}
"""Read by Config, and by mmdet's and this project's tools."""

KEYS = RUNNER | TOOLS


def check_options(options: dict[str, Any], cfg: Config, path: str) -> None:
    """Check command-line settings before they are merged into a config.

    Args:
        options: dotted name -> value.
        cfg: the config as read from its file.
        path: that file.

    Raises:
        UserError: a top-level key that nothing reads, or a variable that the config's own fields have already used.
    """
    for option in options:
        key = option.split(".")[0]
        if key in KEYS:
            continue
        if key not in cfg:
            raise UserError(f"--cfg-options {option}: nothing reads {key!r}{_meant(key, cfg, set(cfg))}")
        if is_referred_to(key, cfg) and (held := sorted(_holding(key, cfg))):
            raise UserError(
                f"--cfg-options {option} has no effect: {path} has already used {key}, in {_listed(held)}; set these, "
                f"or change {key} in a config of your own"
            )


def check_top_level(cfg: Config) -> None:
    """Check a config's own top-level keys.

    A user's own key that other fields refer to is accepted.

    Raises:
        UserError: a key that nothing reads and whose name is close to one that is read.
    """
    for key in cfg:
        if key in KEYS or key.startswith("_") or is_referred_to(key, cfg) or any(_holding(key, cfg)):
            continue
        if near := nearest(key, KEYS):
            raise UserError(f"{key}: nothing reads this key of the config; did you mean {near}?")


def is_referred_to(key: str, cfg: Config) -> bool:
    """Whether the text of the config, or of those that it inherits, uses a variable of this name."""
    uses = rf"(?<![\w.]){re.escape(key)}\b(?!\s*=(?!=))|_base_\.{re.escape(key)}\b"
    return any(re.search(uses, line.split("#")[0]) for line in cfg.text.splitlines())


def _meant(key: str, cfg: Config, own: set[str]) -> str:
    """The nearest key, or the fields of this name within the config."""
    if near := nearest(key, KEYS | own):
        return f"; did you mean {near}?"
    if inside := [where for where, _ in _fields(cfg) if where.split(".")[-1] == key]:
        return f"; did you mean {_listed(inside)}?"
    return ", neither mmengine's runner nor the tools"


def _fields(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of every field below the top-level keys that are read."""
    items = node.items() if hasattr(node, "items") else enumerate(node)
    for key, value in items:
        if not where and key not in KEYS:
            continue
        place = f"{where}.{key}" if where else str(key)
        yield place, value
        if isinstance(value, (dict, list, tuple)):
            yield from _fields(value, place)


def _holding(key: str, cfg: Config) -> Iterator[str]:
    """Places that hold a variable's value, or a text that contains it."""
    wanted = cfg[key]
    for where, value in _fields(cfg):
        within = isinstance(wanted, str) and len(wanted) > 2 and isinstance(value, str) and wanted in value
        if within or (type(value) is type(wanted) and value == wanted):
            yield where


def _listed(places: list[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
