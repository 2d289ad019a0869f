"""Converts mmengine's new-style configs, which import classes, into classic ones, which name them."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry


def classic(cfg: Config) -> Config:
    """Replace a config's classes by names, so that it is read, merged, written and loaded like any other.

    A class under ``type`` or ``constructor`` becomes the name under which mmdet has registered it, or else its dotted
    path; both build that same class. A ``default_scope`` of None becomes 'mmdet', where other names are looked up.

    Raises:
        ImportError: a class that the config imports does not exist.
    """
    settings = cfg._to_lazy_dict()
    scope = settings.get("default_scope", "mmdet") or "mmdet"
    named = {key: _named(key, value, scope) for key, value in settings.items()}
    if "default_scope" in named:
        named["default_scope"] = scope
    return Config(named, cfg_text=cfg.text, filename=cfg.filename, env_variables=cfg.env_variables)


def type_name(kind: str | Callable) -> str:
    """The bare name of a config's ``type``, which may be like 'mmdet.Resize', a dotted path, or the class itself."""
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
    # Classes in other fields stay, as in mmengine: the module that is given one calls it.
    return value


def _name(kind: Callable, scope: str) -> str | Callable:
    """A name by which both the registries and a config file find this same class or function."""
    name = getattr(kind, "__qualname__", "<lambda>")
    if "<" in name:
        return kind
    if kind.__module__ == "mmcv.ops.nms":  # mmcv finds these functions only by their bare names
        return name
    path = f"{kind.__module__}.{name}"
    if kind.__module__.split(".")[0] not in ("mmdet", "mmcv", "mmengine", "torch", scope):
        return path  # it imports the module wherever the config is read
    with suppress(ImportError):
        import_module(f"{scope}.registry")
    registries = [registry for registry in vars(mmengine.registry).values() if isinstance(registry, Registry)]
    found = {registry.children.get(scope, registry).get(name) for registry in registries}
    return name if found <= {kind, None} and kind in found else path
