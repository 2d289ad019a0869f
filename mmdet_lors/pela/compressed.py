"""Models that are compressed as they are built: any backbone for a detector, any other model by itself."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import nn

from mmdet_lors.errors import UserError

from .choice import OMIT
from .compression import compress


@MODELS.register_module(name="PELAModel")
def build_compressed(
    model: dict,
    ratio: float,
    omit: Sequence[str] = OMIT,
    ranks: Mapping[str, int] | None = None,
) -> nn.Module:
    """Build a model of the registry in its compressed form: the structure first, weights when they are loaded.

    What comes back is the model itself, its Linears replaced; nothing is wrapped around it, and no name changes.
    Wherever it loads weights (``init_cfg``, its own ``init_weights``, ``load_from``), a file of the uncompressed model
    is factorised layer by layer, and a file of the compressed one is taken as it is. Without either, its layers start
    as new ones do.

    Args:
        model: config of the model.
        ratio, omit, ranks: see :func:`mmdet_lors.pela.compress`.

    Raises:
        UserError: a setting with which it cannot be compressed.
    """
    # A copy: mmdet's DETRs write into their config, which could not be built again.
    built = MODELS.build(deepcopy(model))
    try:
        compress(built, ratio, omit, ranks, approximate=False, inplace=True)
    except ValueError as error:
        raise UserError(f"{model['type']} cannot be compressed: {error}") from error
    built.register_load_state_dict_post_hook(_warn_of_missing_factors)
    return built


@MODELS.register_module(name="PELABackbone")
def build_compressed_backbone(
    backbone: dict,
    ratio: float,
    omit: Sequence[str] = OMIT,
    ranks: Mapping[str, int] | None = None,
    init_cfg: dict | None = None,
) -> nn.Module:
    """A detector's backbone in its compressed form, see :func:`build_compressed`.

    Args:
        backbone: config of any registered backbone.
        ratio, omit, ranks: see :func:`mmdet_lors.pela.compress`.
        init_cfg: the backbone's own, if it is given here; a checkpoint before or after compression.
    """
    if init_cfg is not None:
        backbone = dict(backbone, init_cfg=init_cfg)
    return build_compressed(backbone, ratio, omit, ranks)


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
