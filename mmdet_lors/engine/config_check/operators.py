"""Checks that what a model calls of mmcv's CUDA operators was compiled: a GPU's driver is enough for all the rest."""

from collections.abc import Iterator
from typing import Any

import torch
from mmcv.ops import get_compiling_cuda_version
from mmcv.ops.point_sample import SimpleRoIAlign
from mmdet.models.losses import FocalLoss
from torch import nn

from mmdet_lors.adamixer.criterion import Criterion
from mmdet_lors.errors import UserError


def check_operators(model: nn.Module, model_cfg: dict, device: str, training: bool = False) -> None:
    """Refuse a model on a CUDA GPU that needs what this mmcv was built without.

    Args:
        model: as built from its config, on any device.
        model_cfg: that config, or one of test-time augmentation around it.
        device: where the model will run.
        training: whether its losses will be called.

    Raises:
        UserError: the first part of the model that needs such an operator, and the command that builds it.
    """
    if torch.device(device).type != "cuda" or get_compiling_cuda_version() != "not available":
        return
    for part in (*_modules(model, training), *_suppressions(model_cfg, "model")):
        raise UserError(
            f"{part} on a GPU needs mmcv's CUDA operators, which this mmcv was built without: install CUDA's compiler, "
            f"nvcc {(torch.version.cuda or '').split('.')[0]}, and run MMCV_CUDA=1 bash tools/setup_env.sh; "
            "--device cpu needs none"
        )


def _modules(model: nn.Module, training: bool) -> Iterator[str]:
    # Ours gives focal loss one-hot targets, for which mmdet computes it in PyTorch.
    ours = {loss for criterion in model.modules() if isinstance(criterion, Criterion) for loss in criterion.children()}
    for name, module in model.named_modules():
        kind = type(module)
        operator = kind.__module__.startswith("mmcv.ops.") and kind is not SimpleRoIAlign  # which is plain PyTorch
        if operator or training and isinstance(module, FocalLoss) and module not in ours:
            yield f"model.{name} ({kind.__name__})"


def _suppressions(node: Any, where: str) -> Iterator[str]:
    """Non-maximum suppression; mmcv does 'soft_nms' on the CPU."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "nms" and isinstance(value, dict) and value.get("type", "nms") != "soft_nms":
                yield f"{where}.nms"
            yield from _suppressions(value, f"{where}.{key}")
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _suppressions(value, f"{where}[{i}]")
