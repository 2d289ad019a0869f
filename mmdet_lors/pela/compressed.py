"""Models that are compressed as they are built: any backbone for a detector, any other model by itself."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmdet_lors.errors import UserError

from .calibration import second_moments
from .choice import OMIT
from .compression import compress, decompress, refill
from .low_rank import LowRank


@MODELS.register_module(name="PELAModel")
def build_compressed(
    model: dict,
    ratio: float | None = None,
    omit: Sequence[str] = OMIT,
    ranks: Mapping[str, int] | None = None,
    convolutions: bool = False,
    calibration: dict | None = None,
) -> nn.Module:
    """Build a model of the registry in its compressed form: the structure first, weights when they are loaded.

    What comes back is the model itself, its layers replaced; nothing is wrapped around it, and no name changes.
    Wherever it loads weights (``init_cfg``, its own ``init_weights``, ``load_from``), a file of the uncompressed model
    is factorised layer by layer, and a file of the compressed one is taken as it is. Without either, its layers start
    as new ones do.

    Args:
        model: config of the model.
        ratio, omit, ranks, convolutions: see :func:`mmdet_lors.pela.compress`.
        calibration: images over which the factors of an uncompressed model's file are fitted to the layers' outputs,
            see :func:`calibration_batches`.

    Raises:
        UserError: a setting with which it cannot be compressed; when weights are loaded, one with which it cannot be
            calibrated.
    """
    # A copy: mmdet's DETRs write into their config, which could not be built again.
    built = MODELS.build(deepcopy(model))
    try:
        compress(built, ratio, omit, ranks, approximate=False, inplace=True, convolutions=convolutions)
    except ValueError as error:
        raise UserError(f"{model['type']} cannot be compressed: {error}") from error
    if calibration is not None:
        check_calibration(calibration)
        built.register_load_state_dict_pre_hook(partial(_calibrate, calibration, omit, convolutions))
    built.register_load_state_dict_post_hook(_warn_of_missing_factors)
    return built


@MODELS.register_module(name="PELABackbone")
def build_compressed_backbone(backbone: dict, *args, init_cfg: dict | None = None, **kwargs) -> nn.Module:
    """A detector's backbone in its compressed form.

    Args:
        backbone: config of any registered backbone.
        args, kwargs: see :func:`build_compressed`. Calibration needs the detector's ``data_preprocessor`` too.
        init_cfg: the backbone's own, if it is given here; a checkpoint before or after compression.
    """
    if init_cfg is not None:
        backbone = dict(backbone, init_cfg=init_cfg)
    return build_compressed(backbone, *args, **kwargs)


def check_calibration(calibration: Any) -> None:
    """Refuse a ``calibration`` that is not what :func:`calibration_batches` takes.

    Raises:
        UserError: names the field.
    """
    fields = ("dataset", "images", "batch_size", "data_preprocessor")
    if not isinstance(calibration, Mapping) or "dataset" not in calibration:
        raise UserError(f"calibration must be a dict with a dataset, got {calibration!r}")
    if unknown := [field for field in calibration if field not in fields]:
        raise UserError(f"calibration has no field {unknown[0]!r}; its fields are {', '.join(fields)}")
    for field in ("images", "batch_size"):
        if isinstance(n := calibration.get(field, 1), bool) or not isinstance(n, int) or n < 1:
            raise UserError(f"calibration.{field} must be 1 or more, got {n!r}")


def calibration_batches(calibration: Mapping, model: nn.Module, mode: str = "predict") -> Iterator[dict | Tensor]:
    """Batches for :func:`~mmdet_lors.pela.second_moments`: the same images in every call.

    Args:
        calibration: ``dataset``, a config; ``images``, how many of it (256), drawn at random with a fixed seed and
            augmented as the data set does; ``batch_size`` (8); ``data_preprocessor``, a config, where the model has
            none of its own.
        model: a model of mmengine, or a backbone, which gets the images alone.
        mode: mmengine's; 'loss' for gradients, see :func:`total_loss`.

    Raises:
        UserError: a backbone without a ``data_preprocessor``.
    """
    own = getattr(model, "data_preprocessor", None)
    if own is None and "data_preprocessor" not in calibration:
        raise UserError("calibration.data_preprocessor is missing: a backbone has none; give the detector's")
    preprocessor = own if own is not None else MODELS.build(calibration["data_preprocessor"])
    preprocessor = preprocessor.to(next(model.parameters()).device)
    size = min(calibration.get("batch_size", 8), images := calibration.get("images", 256))
    loader = Runner.build_dataloader(
        dict(
            batch_size=size,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=True, seed=0),
            dataset=deepcopy(calibration["dataset"]),
        )
    )
    for batch in loader:
        data = preprocessor(batch, False)
        images -= len(data["inputs"])
        samples = data["data_samples"]
        if not isinstance(samples[0], BaseDataElement):  # a classifier's labels
            samples = torch.as_tensor(samples, device=data["inputs"].device) if mode == "loss" else None
        yield data["inputs"] if own is None else dict(inputs=data["inputs"], data_samples=samples, mode=mode)
        if images <= 0:
            return


def total_loss(losses: Mapping[str, Tensor | Sequence[Tensor]]) -> Tensor:
    """The sum that mmengine trains with, of what a model returns in its mode 'loss'."""
    return BaseModel.parse_losses(None, losses)[0]


def fit_outputs(
    compressed: nn.Module, plain: nn.Module, calibration: Mapping, omit: Sequence[str], convolutions: bool
) -> None:
    """Fit every low-rank layer of a model to the outputs of the plain model's layer of its name.

    Raises:
        UserError: see :func:`calibration_batches`; inputs that are not finite, or a layer that gets none.
    """
    try:
        moments = second_moments(plain, calibration_batches(calibration, plain), omit, convolutions)
    except ValueError as error:
        raise UserError(str(error)) from error
    refill(compressed, plain, moments)
    print_log(
        f"{len(moments)} layers are fitted to their outputs on {calibration.get('images', 256)} images", "current"
    )


def _calibrate(
    calibration: Mapping,
    omit: Sequence[str],
    convolutions: bool,
    model: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    *args: Any,
) -> None:
    """Where all plain weights are to be loaded, load the factors that fit their outputs instead."""
    layers = {prefix + name: layer for name, layer in model.named_modules() if isinstance(layer, LowRank)}
    weights = {name: state_dict.get(f"{name}.weight") for name in layers}
    if not layers or any(
        weight is None or f"{name}.U" in state_dict or weight.shape != layers[name].weight_shape
        for name, weight in weights.items()
    ):
        return
    plain = decompress(model)
    plain.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}, strict=False
    )
    fit_outputs(model, plain, calibration, omit, convolutions)
    for name, layer in layers.items():
        del state_dict[f"{name}.weight"]
        state_dict |= {f"{name}.{factor}": getattr(layer, factor).detach().clone() for factor in "UV"}


def _warn_of_missing_factors(model: nn.Module, incompatible_keys) -> None:
    """Backbones load with strict=False, some without a word: a file that brings no weights must show."""
    missing = [key.removesuffix(".U") for key in incompatible_keys.missing_keys if key.endswith(".U")]
    if missing:
        print_log(
            f"{len(missing)} low-rank layers of {type(model).__name__} were not in the checkpoint and keep their "
            f"weights: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
            logger="current",
            level=30,
        )
