"""A timm Vision Transformer inside a backbone: how it is built, and how it finds its weights in a file."""

from collections.abc import Mapping

import timm
from mmengine.model import BaseModule
from timm.layers import resample_abs_pos_embed

from mmdet_lors.classification.pretrained import read_weights
from mmdet_lors.errors import UserError

PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
"""Weights that every ViT of timm has: what stands before the first in a file is the ViT's own prefix there."""


class TimmViT(BaseModule):
    """A backbone that has a ViT as ``vit``. Subclasses make maps of its tokens.

    Position embeddings are interpolated to the image; on loading, to the image size that the model is built for.

    Args:
        model_name: a ViT or DeiT of timm.
        vit: further arguments of ``timm.create_model``, such as ``drop_path_rate`` and ``img_size``.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``: 'timm://NAME', or a file in which the ViT's weights have
            timm's names behind any prefix: timm's own, a classifier's, or a student's that was extracted.

    Raises:
        UserError: ``model_name`` is not one of timm's ViTs; a file without the ViT's weights, in ``init_weights``.
    """

    def __init__(self, model_name: str, vit: Mapping | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if init_cfg is not None and init_cfg.get("type") != "Pretrained":
            raise UserError(f"backbone.init_cfg must be of type 'Pretrained', got {init_cfg.get('type')!r}")
        size = dict(dynamic_img_size=True, dynamic_img_pad=True)
        try:
            self.vit = timm.create_model(model_name, num_classes=0, **size, **dict(vit or {}))
        except (RuntimeError, TypeError) as error:
            raise UserError(f"backbone.model_name {model_name!r} is not a ViT of timm: {error}") from error

    def init_weights(self) -> None:
        """Load the ViT's weights, if there are any to load; everything else keeps PyTorch's start."""
        if self.init_cfg is None:
            return
        path = self.init_cfg["checkpoint"]
        weights = read_weights(path)
        prefix = next((key.removesuffix(PATCHES) for key in weights if key.endswith(PATCHES)), None)
        if prefix is None:
            raise UserError(f"checkpoint {path} has no {PATCHES}: it does not hold a ViT of timm")
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        try:
            if POSITIONS in weights and weights[POSITIONS].shape[1] != self.vit.pos_embed.shape[1]:
                weights[POSITIONS] = resample_abs_pos_embed(
                    weights[POSITIONS], self.vit.patch_embed.grid_size, num_prefix_tokens=self.vit.num_prefix_tokens
                )
            missing, _ = self.vit.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise UserError(f"checkpoint {path} is of another ViT: {str(error).splitlines()[-1].strip()}") from error
        if missing:
            raise UserError(
                f"checkpoint {path} lacks {len(missing)} of the ViT's weights ({', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''})"
            )
