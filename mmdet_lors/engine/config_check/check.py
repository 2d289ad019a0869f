"""Binds each part of a config to the signature of the class that mmengine will build from it."""

import inspect
import logging
from copy import deepcopy
from typing import Any

from mmengine.config import Config
from mmengine.dist import init_dist
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.registry import (
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    MODEL_WRAPPERS,
    MODELS,
    RUNNERS,
    VISBACKENDS,
    VISUALIZERS,
)
from mmengine.runner import Priority, Runner, get_priority
from mmengine.utils.dl_utils import set_multi_processing

from mmdet_lors.errors import UserError

from .data import check_dataloader, check_targets
from .evaluators import check_evaluator, check_monitors
from .pipelines import ANYTHING, check_pipeline, is_known
from .signatures import bind, check_node, find, meant, said_of
from .top_level import check_top_level
from .training import check_optimizer, check_schedulers

DEFAULT_HOOKS = {"runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint", "visualization"}
JUDGED = ("dataloader", "cfg", "evaluator")
SPLITS = dict(train=("dataloader", "cfg"), val=JUDGED, test=JUDGED)


def check_config(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check everything except the model, which :func:`~mmdet_lors.engine.build.build_without_weights` builds.

    No data is read and nothing is written. What the signature of a user's own class does not tell is accepted.

    Args:
        cfg: the whole config.
        splits: which of 'train', 'val' and 'test' are checked.

    Raises:
        UserError: the place of what is unknown, missing or without effect, the nearest known name, and the remedy.
    """
    check_top_level(cfg)
    for split in splits:
        _check_complete(cfg, split)
        _check_loop(cfg.get(f"{split}_cfg"), split)
        loaded = check_dataloader(cfg.get(f"{split}_dataloader"), f"{split}_dataloader")
        if split == "train" and loaded is not ANYTHING:
            check_targets(cfg, loaded)
    given = None
    for split in splits:
        if evaluator := cfg.get(f"{split}_evaluator"):
            names = check_evaluator(evaluator, f"{split}_evaluator")
            given = names if split == "val" else given
    hooks = _check_hooks(cfg)
    if "train" in splits:
        check_optimizer(cfg.get("optim_wrapper"))
        check_schedulers(cfg.get("param_scheduler"))
        if cfg.get("val_cfg") is not None:
            check_monitors(cfg, given, hooks)
    _check_runtime(cfg)
    _check_tta(cfg)


def _check_complete(cfg: Config, split: str) -> None:
    """Refuse part of a split's settings: the runner needs all of them, or none."""
    names = [f"{split}_{part}" for part in SPLITS[split]] + (["optim_wrapper"] if split == "train" else [])
    missing = [name for name in names if cfg.get(name) is None]
    if missing and len(missing) < len(names):
        there = next(name for name in names if name not in missing)
        raise UserError(
            f"config has {there}, but no {', '.join(missing)}: a run needs all of {', '.join(names)}, or none of them"
        )
    if missing and split == "train":
        raise UserError(f"config has none of {', '.join(names)}: there is nothing to train")


def _check_loop(loop: Any, split: str) -> None:
    where = f"{split}_cfg"
    if not isinstance(loop, dict):
        return
    supplied = ("runner", "dataloader") if split == "train" else ("runner", "dataloader", "evaluator")
    default = dict(val="ValLoop", test="TestLoop").get(split)
    named = ()
    if split == "train" and "by_epoch" in loop:
        default, named = "EpochBasedTrainLoop" if loop["by_epoch"] else "IterBasedTrainLoop", ("by_epoch",)
    if split == "train" and "type" not in loop and "by_epoch" not in loop:
        raise UserError(f"{where} needs type='EpochBasedTrainLoop' or 'IterBasedTrainLoop', or by_epoch")
    check_node(loop, where, LOOPS, default, supplied=supplied, named=named)
    for field in ("max_epochs", "max_iters", "val_interval"):
        value = loop.get(field, 1)
        if isinstance(value, (int, float)) and value < 1:
            raise UserError(f"{where}.{field} must be 1 or more, got {value}")


def _check_hooks(cfg: Config) -> dict[str, dict]:
    """Check the hooks; returns every hook's config by its place."""
    found = {}
    for name, hook in (cfg.get("default_hooks") or {}).items():
        if isinstance(hook, dict) and "type" not in hook:
            close = meant(name, DEFAULT_HOOKS, "mmengine's are")
            raise UserError(f"default_hooks.{name} has no type{'' if name in DEFAULT_HOOKS else close}")
        found[f"default_hooks.{name}"] = hook
    found |= {f"custom_hooks[{i}]": hook for i, hook in enumerate(cfg.get("custom_hooks") or [])}
    found = {where: hook for where, hook in found.items() if isinstance(hook, dict)}
    for where, hook in found.items():
        kind = check_node(hook, where, HOOKS, named=("priority",))
        if "priority" in hook:
            try:
                get_priority(hook["priority"])
            except (KeyError, ValueError, TypeError) as error:
                levels = ", ".join(level.name for level in Priority)
                raise UserError(
                    f"{where}.priority must be a number from 0 to 100 or one of {levels}, got {hook['priority']!r}"
                ) from error
        if inspect.isclass(kind) and issubclass(kind, (CheckpointHook, EarlyStoppingHook)) and is_known(kind):
            # CheckpointHook passes others on to a method that accepts none.
            bind(kind, hook, where, named=("priority",), closed=True)
            with said_of(where):
                HOOKS.build({key: value for key, value in deepcopy(hook).items() if key != "priority"})
    return found


def _check_runtime(cfg: Config) -> None:
    """Check visualizer, log processor, seeds, environment, and the model's wrapper in distributed training."""
    taken = dict(supplied=("name", "save_dir"), named=("name",))
    visualizer = cfg.get("visualizer")
    kind = check_node(visualizer, "visualizer", VISUALIZERS, "Visualizer", **taken)
    if kind is not None:
        for i, backend in enumerate(visualizer.get("vis_backends") or []):
            check_node(backend, f"visualizer.vis_backends[{i}]", VISBACKENDS, supplied=("save_dir",))
    level = cfg.get("log_level", "INFO")
    if isinstance(level, str) and not isinstance(getattr(logging, level.upper(), None), int):
        raise UserError(f"log_level must be DEBUG, INFO, WARNING or ERROR, got {level!r}")
    check_node(cfg.get("log_processor"), "log_processor", LOG_PROCESSORS, "LogProcessor")
    if isinstance(cfg.get("randomness"), dict):
        bind(Runner.set_randomness, cfg.randomness, "randomness", supplied=("self",))
    check_node(
        cfg.get("model_wrapper_cfg"),
        "model_wrapper_cfg",
        MODEL_WRAPPERS,
        "MMDistributedDataParallel",
        supplied=("module", "device_ids"),
    )
    if "runner_type" in cfg:
        find(cfg.runner_type, RUNNERS, "config", "runner_type")
    groups = dict(
        env_cfg={"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"}, auto_scale_lr={"enable", "base_batch_size"}
    )
    for name, keys in groups.items():
        for key in cfg.get(name) or {}:
            if key not in keys:
                raise UserError(f"{name}.{key}: nothing reads it{meant(key, keys)}")
    env = cfg.get("env_cfg") or {}
    bind(set_multi_processing, env.get("mp_cfg") or {}, "env_cfg.mp_cfg", supplied=("distributed",))
    bind(init_dist, env.get("dist_cfg") or {}, "env_cfg.dist_cfg", supplied=("launcher",))


def _check_tta(cfg: Config) -> None:
    check_node(cfg.get("tta_model"), "tta_model", MODELS, supplied=("module",))
    if isinstance(cfg.get("tta_pipeline"), (list, tuple)):
        check_pipeline(cfg.tta_pipeline, "tta_pipeline", set())
