"""Binds each part of a config to the signature of the class that mmengine will build from it."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import init_dist
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    RUNNERS,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
)
from mmengine.runner import Priority, Runner, get_priority
from mmengine.utils.dl_utils import set_multi_processing
from torch.utils.data import DataLoader

from mmdet_lors.errors import UserError

from .evaluators import check_evaluator, check_monitors
from .pipelines import ANYTHING, LOADED_BY, check_pipeline, is_known
from .signatures import bind, find, meant, nearest
from .top_level import check_top_level

PARAMWISE = {
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "flat_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
}
"""Keys that DefaultOptimWrapperConstructor reads in its paramwise_cfg; it ignores all others."""

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
        loaded = _check_dataloader(cfg.get(f"{split}_dataloader"), f"{split}_dataloader")
        if split == "train" and loaded is not ANYTHING:
            _check_targets(cfg, loaded)
    given = None
    for split in splits:
        if evaluator := cfg.get(f"{split}_evaluator"):
            names = check_evaluator(evaluator, f"{split}_evaluator")
            given = names if split == "val" else given
    hooks = _check_hooks(cfg)
    if "train" in splits:
        _check_optimizer(cfg.get("optim_wrapper"))
        _check_schedulers(cfg.get("param_scheduler"))
        if cfg.get("val_cfg") is not None:
            check_monitors(cfg, given, hooks)
    _check_runtime(cfg)
    _check_tta(cfg)


def _node(value: Any, where: str, registry: Registry, default: str | None = None, **taken: Any) -> Any:
    """Bind a config to the class it names; anything else, such as an object that is already built, is accepted.

    Args:
        taken: ``supplied`` and ``named`` of :func:`bind`.
    """
    if not isinstance(value, dict):
        return None
    if "type" not in value and default is None:
        raise UserError(f"{where} has no type, which names its class in the {registry.name} registry")
    with registry.switch_scope_and_registry(value.get("_scope_")):
        kind = find(value.get("type", default), registry, where)
    bind(kind, value, where, **taken)
    return kind


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
    _node(loop, where, LOOPS, default, supplied=supplied, named=named)
    for field in ("max_epochs", "max_iters", "val_interval"):
        value = loop.get(field, 1)
        if isinstance(value, (int, float)) and value < 1:
            raise UserError(f"{where}.{field} must be 1 or more, got {value}")


def _check_dataloader(loader: Any, where: str) -> set[str] | None:
    """Check a dataloader; returns the keys of a sample, as :func:`check_pipeline` does."""
    if not isinstance(loader, dict):
        return ANYTHING
    batches = loader.get("batch_sampler")
    named = ("num_batch_per_epoch", "disable_subprocess_warning")
    bind(DataLoader, loader, where, supplied=("dataset",), named=named)
    if "dataset" not in loader:
        raise UserError(f"{where} has no dataset")
    _node(loader.get("sampler"), f"{where}.sampler", DATA_SAMPLERS, supplied=("dataset", "seed"))
    _node(batches, f"{where}.batch_sampler", DATA_SAMPLERS, supplied=("sampler", "batch_size"))
    _node(loader.get("collate_fn"), f"{where}.collate_fn", FUNCTIONS, supplied=("data_batch", "batch"))
    given = ("worker_id", "num_workers", "rank", "seed")
    _node(loader.get("worker_init_fn"), f"{where}.worker_init_fn", FUNCTIONS, supplied=given)
    for field, least in (("batch_size", 1), ("num_workers", 0)):
        if isinstance(loader.get(field), int) and loader[field] < least:
            raise UserError(f"{where}.{field} must be {least} or more, got {loader[field]}")
    if loader.get("shuffle") and loader.get("sampler"):
        raise UserError(f"{where}.shuffle: the sampler decides the order; set {where}.sampler.shuffle")
    if batches and loader.get("drop_last"):
        raise UserError(f"{where}.drop_last: the batch sampler decides it; set {where}.batch_sampler.drop_last")
    return _check_dataset(loader["dataset"], f"{where}.dataset", set())


def _check_dataset(dataset: Any, where: str, mixed: set[str]) -> set[str] | None:
    """Check a data set, those within it, and their pipelines; returns the keys of its samples."""
    if not isinstance(dataset, dict):
        return ANYTHING
    kind = _node(dataset, where, DATASETS)
    inner = [(f"{where}.dataset", dataset["dataset"])] if isinstance(dataset.get("dataset"), dict) else []
    if isinstance(dataset.get("datasets"), (list, tuple)):
        inner += [(f"{where}.datasets[{i}]", part) for i, part in enumerate(dataset["datasets"])]
    several = {base.__name__ for base in getattr(kind, "__mro__", ())} & {"MultiImageMixDataset"}
    loaded = mixed if is_known(kind) else ANYTHING
    with DATASETS.switch_scope_and_registry(dataset.get("_scope_")):
        for place, part in inner:
            found = _check_dataset(part, place, mixed)
            loaded = ANYTHING if found is ANYTHING or loaded is ANYTHING else loaded | found
        if several and loaded is not ANYTHING:
            loaded = loaded | {"mix_results"}
        if is_known(kind):
            _check_settings(dataset, where)
        steps = dataset.get("pipeline")
        if isinstance(steps, (str, dict)):
            raise UserError(f"{where}.pipeline must be a list of transforms, got {steps!r}")
        return check_pipeline(steps, f"{where}.pipeline", loaded) if isinstance(steps, (list, tuple)) else loaded


def _check_targets(cfg: Config, loaded: set[str]) -> None:
    """Refuse a training pipeline that does not load what predictions are compared with."""
    if "img" in loaded and not any(key.startswith("gt_") for key in loaded):
        loader = LOADED_BY["gt_bboxes"]
        raise UserError(f"train_dataloader: its pipeline loads no annotations; add {loader}")
    head = cfg.get("model", {}).get("roi_head")
    if isinstance(head, dict) and head.get("mask_head") and loaded and "gt_masks" not in loaded:
        loader = LOADED_BY["gt_masks"]
        raise UserError(f"train_dataloader: model.roi_head.mask_head needs gt_masks; add {loader}")


def _check_settings(dataset: dict, where: str) -> None:
    """Check fields that are dictionaries themselves: data sets read some of their keys and ignore the rest."""
    known = dict(
        metainfo={"classes", "palette"},
        filter_cfg={"filter_empty_gt", "min_size", "bbox_min_size"},
        data_prefix={"img", "img_path", "seg", "seg_map_path"},
    )
    for field, keys in known.items():
        node = dataset.get(field)
        if not isinstance(node, dict):
            continue
        for key in node:
            near = nearest(key, keys, cutoff=0.8)
            if key not in keys and near:
                raise UserError(f"{where}.{field}.{key}: no data set reads it; did you mean {near}?")


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
        kind = _node(hook, where, HOOKS, named=("priority",))
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
            with _said_of(where):
                HOOKS.build({key: value for key, value in deepcopy(hook).items() if key != "priority"})
    return found


def _check_optimizer(wrapper: Any) -> None:
    where = "optim_wrapper"
    if not isinstance(wrapper, dict):
        return
    constructor = wrapper.get("constructor", "DefaultOptimWrapperConstructor")
    kind = find(constructor, OPTIM_WRAPPER_CONSTRUCTORS, where, "constructor")
    if kind is not DefaultOptimWrapperConstructor and not isinstance(wrapper.get("optimizer"), dict):
        return  # one of several optimizers, which only the constructor knows
    named = ("constructor", "paramwise_cfg")
    _node(wrapper, where, OPTIM_WRAPPERS, "OptimWrapper", supplied=("optimizer",), named=named)
    if "optimizer" not in wrapper:
        raise UserError(f"{where} has no optimizer")
    optimizer = _node(wrapper["optimizer"], f"{where}.optimizer", OPTIMIZERS, supplied=("params",))
    if optimizer is not None and is_known(optimizer):
        with _said_of(f"{where}.optimizer"):
            OPTIMIZERS.build(dict(deepcopy(wrapper["optimizer"]), params=[torch.nn.Parameter(torch.zeros(1))]))
    clip = wrapper.get("clip_grad")
    if isinstance(clip, dict):
        functions = dict(norm=torch.nn.utils.clip_grad_norm_, value=torch.nn.utils.clip_grad_value_)
        if (by := clip.get("type", "norm")) not in functions:
            raise UserError(f"{where}.clip_grad.type must be 'norm' or 'value', got {by!r}")
        bind(functions[by], clip, f"{where}.clip_grad", supplied=("parameters",))
    if kind is DefaultOptimWrapperConstructor:
        for key in wrapper.get("paramwise_cfg") or {}:
            if key not in PARAMWISE:
                raise UserError(f"{where}.paramwise_cfg.{key}: nothing reads it{meant(key, PARAMWISE)}")
        for name, keys in ((wrapper.get("paramwise_cfg") or {}).get("custom_keys") or {}).items():
            for key in keys:
                if key not in ("lr_mult", "decay_mult") and (near := nearest(key, ("lr_mult", "decay_mult"))):
                    raise UserError(f"{where}.paramwise_cfg.custom_keys.{name}.{key}: did you mean {near}?")


def _check_schedulers(schedulers: Any) -> None:
    if not schedulers:
        return
    if isinstance(schedulers, dict) and "type" not in schedulers:
        for name, own in schedulers.items():  # one list for each of several optimizers
            _check_scheduler_list(own, f"param_scheduler.{name}")
    else:
        _check_scheduler_list(schedulers, "param_scheduler")


def _check_scheduler_list(schedulers: Any, where: str) -> None:
    single = isinstance(schedulers, dict)
    for i, scheduler in enumerate([schedulers] if single else schedulers):
        place = where if single else f"{where}[{i}]"
        named = ("convert_to_iter_based", "epoch_length")
        kind = _node(scheduler, place, PARAM_SCHEDULERS, supplied=("optimizer",), named=named)
        if kind is None or not is_known(kind):
            continue
        settings = {key: value for key, value in deepcopy(scheduler).items() if key not in named}
        # If the config has no end, a run gives its own length.
        settings["optimizer"] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        settings["end"] = settings.get("end", 10**9)
        with _said_of(place):
            PARAM_SCHEDULERS.build(settings)


def _check_runtime(cfg: Config) -> None:
    """Check visualizer, log processor, seeds, environment, and the model's wrapper in distributed training."""
    taken = dict(supplied=("name", "save_dir"), named=("name",))
    visualizer = cfg.get("visualizer")
    kind = _node(visualizer, "visualizer", VISUALIZERS, "Visualizer", **taken)
    if kind is not None:
        for i, backend in enumerate(visualizer.get("vis_backends") or []):
            _node(backend, f"visualizer.vis_backends[{i}]", VISBACKENDS, supplied=("save_dir",))
    level = cfg.get("log_level", "INFO")
    if isinstance(level, str) and not isinstance(getattr(logging, level.upper(), None), int):
        raise UserError(f"log_level must be DEBUG, INFO, WARNING or ERROR, got {level!r}")
    _node(cfg.get("log_processor"), "log_processor", LOG_PROCESSORS, "LogProcessor")
    if isinstance(cfg.get("randomness"), dict):
        bind(Runner.set_randomness, cfg.randomness, "randomness", supplied=("self",))
    _node(
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
    _node(cfg.get("tta_model"), "tta_model", MODELS, supplied=("module",))
    if isinstance(cfg.get("tta_pipeline"), (list, tuple)):
        check_pipeline(cfg.tta_pipeline, "tta_pipeline", set())


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Adds a place in the config to whatever a constructor refuses."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: {reason}") from error
