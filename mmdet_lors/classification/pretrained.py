"""ImageNet weights for some parts of a model, as in Table 11 of the LORS paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from mmengine.logging import print_log
from mmengine.registry import WEIGHT_INITIALIZERS
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdet_lors.engine.checkpoint.reading import read_checkpoint
from mmdet_lors.engine.checkpoint.safe_loading import weights_only
from mmdet_lors.errors import UserError, first_line

TIMM = "timm://"


def read_weights(checkpoint: str) -> Mapping[str, Tensor]:
    """The weights of a timm model, by name.

    Args:
        checkpoint: a .safetensors file; a torch checkpoint with the weights at its top level or under 'model' or
            'state_dict'; or 'timm://NAME', which timm downloads.

    Raises:
        UserError: the file cannot be read or downloaded; says why.
    """
    if checkpoint.startswith(TIMM):
        name = checkpoint.removeprefix(TIMM)
        try:
            with weights_only():
                return timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:
            # timm's network stack raises errors of no common class.
            raise UserError(
                f"init_cfg.checkpoint {checkpoint} cannot be loaded: {first_line(error)}; a file on disk works as well"
            ) from error
    if checkpoint.endswith(".safetensors") and Path(checkpoint).is_file():
        try:
            return load_file(checkpoint)
        except SafetensorError as error:
            raise UserError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    content = read_checkpoint(checkpoint)
    weights = content.get("model", content.get("state_dict", content))
    # Our own classifier keeps timm's model under this name.
    return {name.removeprefix("network."): weight for name, weight in weights.items()}


@WEIGHT_INITIALIZERS.register_module()
class PretrainedParts:
    """Copies the trained weights of the named parts into a model, and leaves all others as they are.

    Args:
        checkpoint: see :func:`read_weights`.
        parts: a weight belongs to a part if its dotted name contains it: ``blocks.0.attn.qkv.weight`` to 'attn'.

    Raises:
        UserError: a part that the model does not have, a weight that the checkpoint does not have or has in another
            shape.
    """

    def __init__(self, checkpoint: str, parts: Sequence[str]) -> None:
        self.checkpoint, self.parts = checkpoint, tuple(parts)

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        ours = module.state_dict()
        theirs = read_weights(self.checkpoint)
        chosen = {part: [name for name in ours if part in name.split(".")] for part in self.parts}
        for part, names in chosen.items():
            if not names:
                raise UserError(f"init_cfg.parts has {part!r}, which no weight's name of {type(module).__name__} has")
            for name in names:
                if name not in theirs:
                    raise UserError(f"init_cfg.checkpoint {self.checkpoint} has no {name}")
                if theirs[name].shape != ours[name].shape:
                    shapes = f"{tuple(theirs[name].shape)} instead of {tuple(ours[name].shape)}"
                    raise UserError(f"init_cfg.checkpoint {self.checkpoint} has {name} of shape {shapes}")
                ours[name].copy_(theirs[name])
        copied = ", ".join(f"{len(names)} weights of {part}" for part, names in chosen.items())
        print_log(f"from {self.checkpoint}: {copied}", logger="current")
