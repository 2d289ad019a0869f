"""What makes a run of a config short: other weights to start from, smaller images, fewer epochs, no workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config

SMALL = {
    "scale": (160, 96),
    "scales": [(96, 160), (128, 160)],
    "crop_size": (96, 128),
}
"""Fields of transforms that say how large an image is, and what they are here."""
LARGER = {"scale": (320, 240), "scales": [(240, 320), (256, 320)], "crop_size": (192, 256)}
"""The same for DINO, which chooses 900 places of its feature maps."""
SEGMENTATION = 64
"""Side of mmsegmentation's crops, which are as large as the model's images."""
CLASSIFICATION = 32
QUERIES = 20
"""All of AdaMixer's decoder but its self-attention takes time in proportion to them."""
REGIONS = 16
"""Proposals of a two-stage detector, and those of them that it learns from."""


TEACHERS = {"teacher_checkpoint": "teacher", "checkpoint": "model"}
"""Fields that name the weights of a model, and where its config is."""


def settings(cfg: Config, folder: Path) -> dict[str, Any]:
    """--cfg-options for two iterations, a validation and a checkpoint of this config.

    All of the model but the number of queries, the data set's class, its filter, its sampler and its batches stay what
    they are.

    Args:
        cfg: the config.
        folder: where a distillation's teacher is written.
    """
    found: dict[str, Any] = {place: None for place in _weights(cfg.model, "model")}
    segments, classifies = "mmseg" in str(cfg.get("default_scope")), "Classifier" in str(cfg.model)
    sizes = LARGER if "'as_two_stage': True" in str(cfg.model) else SMALL
    if segments:
        sizes = dict(scale=(128, SEGMENTATION), crop_size=(SEGMENTATION, SEGMENTATION))
    for name in ("train", "val", "test"):
        loader = f"{name}_dataloader"
        found |= {f"{loader}.num_workers": 0, f"{loader}.persistent_workers": False}
        for place, step in _steps(cfg[loader], loader):
            found |= {f"{place}.{field}": value for field, value in sizes.items() if field in step}
            if "input_size" in step:
                found[f"{place}.input_size"] = CLASSIFICATION
    side = SEGMENTATION if segments else CLASSIFICATION
    if segments:
        found["model.data_preprocessor.size"] = (side, side)
    if segments or classifies:
        found |= {f"{place}.img_size": side for place in _timm_models(cfg.model, "model")}
    if "query_generator" in cfg.model:
        found["model.query_generator.num_queries"] = QUERIES
    for place, node in _walk(cfg.model, "model"):
        if node.get("type") == "RandomSampler":
            found[f"{place}.num"] = REGIONS
        if place.endswith((".rpn", ".rpn_proposal")) and "max_per_img" in node:
            found[f"{place}.max_per_img"] = REGIONS
    found |= {f"model.{field}": str(folder / "teacher.pth") for field in TEACHERS if field in cfg.model}
    if cfg.train_cfg.get("type") == "IterBasedTrainLoop" or cfg.train_cfg.get("by_epoch") is False:
        return found | {"train_cfg.max_iters": 2, "train_cfg.val_interval": 2, "default_hooks.checkpoint.interval": 2}
    found |= {"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1, "default_hooks.checkpoint.interval": 1}
    if classifies:  # ImageNet's thousand classes are a thousand pictures
        found |= {"val_dataloader.num_batch_per_epoch": 1, "test_dataloader.num_batch_per_epoch": 1}
    return found | {"train_dataloader.num_batch_per_epoch": 2}


def one_more(options: dict[str, Any]) -> dict[str, Any]:
    """The same for a run that goes on for one iteration."""
    if "train_cfg.max_iters" in options:
        return options | {"train_cfg.max_iters": 3, "train_cfg.val_interval": 3, "default_hooks.checkpoint.interval": 3}
    return options | {"train_cfg.max_epochs": 2, "train_dataloader.num_batch_per_epoch": 1}


def write_teacher(cfg: Config, options: dict[str, Any]) -> None:
    """Random weights for a distillation to learn from, or for LoRA to start from."""
    for field, model in TEACHERS.items():
        if path := options.get(f"model.{field}"):
            changed = cfg.copy()
            changed.merge_from_dict(options, allow_list_keys=True)
            torch.save(dict(state_dict=MODELS.build(changed.model[model]).state_dict()), path)


def arguments(options: dict[str, Any]) -> list[str]:
    """As words of a command line."""
    return ["--cfg-options", *(f"{place}={value}".replace(" ", "") for place, value in options.items())]


def _walk(node: Any, place: str) -> Iterator[tuple[str, dict]]:
    """Every dict of a config, and its place."""
    if isinstance(node, dict):
        yield place, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in children:
        yield from _walk(value, f"{place}.{key}")


def _weights(model: dict, place: str) -> Iterator[str]:
    """Fields that name weights to start from."""
    for inner, node in _walk(model, place):
        if isinstance(node.get("pretrained"), str):
            yield f"{inner}.pretrained"
        if isinstance(node.get("init_cfg"), dict) and "checkpoint" in node["init_cfg"]:
            yield f"{inner}.init_cfg"


def _steps(loader: dict, place: str) -> Iterator[tuple[str, dict]]:
    """Transforms of a loader's data set."""
    for inner, node in _walk(loader, place):
        if ".pipeline." in inner or inner.endswith(".transform"):
            yield inner, node


def _timm_models(model: dict, place: str) -> Iterator[str]:
    """Where the fields of a timm model are, which has to know how large an image is."""
    for inner, node in _walk(model, place):
        if inner.endswith((".network", ".vit")) and ("model_name" in node or "img_size" in node):
            yield inner
