"""mmengine's new-style configs, which import classes, as the classic ones with names that they stand for."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry


def classic(cfg: Config) -> Config:
    """The config with names where classes were, so that it is read, merged, written and loaded again like any other.

    A class under ``type`` or ``constructor`` becomes the name that mmdet has it registered by, or else its dotted path;
    both build that very class. A ``default_scope`` of None becomes 'mmdet', where names that are left are looked for.

    Raises:
        ImportError: a class that the config imports is not there.
    """
    settings = cfg._to_lazy_dict()
    scope = settings.get("default_scope", "mmdet") or "mmdet"
    named = {key: _named(key, value, scope) for key, value in settings.items()}
    if "default_scope" in named:
        named["default_scope"] = scope
    return Config(named, cfg_text=cfg.text, filename=cfg.filename, env_variables=cfg.env_variables)


def type_name(kind: str | Callable) -> str:
    """The bare name of a config's ``type``: of 'mmdet.Resize', of a dotted path, or of the class itself."""
    return kind.rsplit(".", 1)[-1] if isinstance(kind, str) else getattr(kind, "__name__", repr(kind))


def _named(key: str, value: Any, scope: str) -> Any:
    if isinstance(value, dict):
        return {k: _named(k, v, scope) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_named("", v, scope) for v in value)
    lazy = isinstance(value, (LazyObject, LazyAttr))
    if key in ("type", "constructor"):
        kind = value.build() if lazy else value
        return _name(kind, scope) if callable(kind) else kind
    if isinstance(value, LazyAttr) and not callable(constant := value.build()):
        return constant
    # Classes elsewhere are passed on as mmengine does: a module that takes one calls it.
    return value


def _name(kind: Callable, scope: str) -> str | Callable:
    """What both the registries and a config file find this very class or function by."""
    name = getattr(kind, "__qualname__", "<lambda>")
    if "<" in name:
        return kind
    if kind.__module__ == "mmcv.ops.nms":  # mmcv knows these functions by their bare names alone
        return name
    path = f"{kind.__module__}.{name}"
    if kind.__module__.split(".")[0] not in ("mmdet", "mmcv", "mmengine", "torch", scope):
        return path  # which imports the module, wherever the config is read
    with suppress(ImportError):
        import_module(f"{scope}.registry")
    registries = [registry for registry in vars(mmengine.registry).values() if isinstance(registry, Registry)]
    found = {registry.children.get(scope, registry).get(name) for registry in registries}
    return name if found <= {kind, None} and kind in found else path
