"""A trained AdaMixer, as the tools that change its weights get it: a config and a checkpoint that belong together."""

from collections.abc import Mapping

from mmengine.config import Config
from torch import Tensor, nn

from mmdet_lors.engine.launch import load_config
from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError

from .reading import check_fit, read_checkpoint


def read_config(path: str) -> Config:
    """A detector's config.

    Raises:
        UserError: no such file, a broken one, or one without an AdaMixer decoder.
    """
    cfg = load_config(path)
    decoder = cfg.model.get("decoder")
    if decoder is None or "stage" not in decoder:  # a DETR has a decoder, too
        missing = "model.decoder" if decoder is None else "model.decoder.stage"
        raise UserError(f"config {path} has no {missing}: it is not an AdaMixer")
    return cfg


def uncompressed(model_cfg: dict) -> dict:
    """Of a ``PELAModel`` the config of the model that it compresses; any other config itself."""
    return model_cfg["model"] if type_name(model_cfg.get("type", "")) == "PELAModel" else model_cfg


def read_weights(path: str, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """The weights of a checkpoint that fits this model, and its ``meta``.

    Raises:
        UserError: a file that cannot be read, weights of another architecture, or values that are not finite.
    """
    checkpoint = read_checkpoint(path)
    check_fit(model, checkpoint, path)
    weights = {k.removeprefix("module."): v for k, v in checkpoint.get("state_dict", checkpoint).items()}
    meta = checkpoint.get("meta")
    return weights, dict(meta) if isinstance(meta, Mapping) else {}
