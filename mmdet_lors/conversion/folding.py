"""Folding: a model with LoRA, or an AdaMixer with LORS, is exactly some plain model, free of their extra work."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from mmdet_lors.engine.checkpoint.config_and_weights import uncompressed
from mmdet_lors.pela import OMIT
from mmdet_lors.with_lora import merged, without_lora


def folded_config(model_cfg: dict) -> dict | None:
    """The model without LoRA; if it has none, an AdaMixer without LORS; None for a model that has neither.

    A compressed model keeps its compression; what the stages get of their own is not compressed.
    """
    if (plain := without_lora(model_cfg)) != model_cfg:
        return plain
    if (inner := uncompressed(model_cfg)) is not model_cfg:
        inner = folded_config(inner)
        return inner and dict(model_cfg, model=inner, omit=[*model_cfg.get("omit", OMIT), "mixing.out_proj"])
    decoder = model_cfg.get("decoder") or {}
    return dict(model_cfg, decoder=dict(decoder, lors=None)) if decoder.get("lors") else None


@torch.no_grad()
def folded_state_dict(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    r"""The state dict of the model of :func:`folded_config`, of equal outputs; the model is left as it is.

    A layer with LoRA gets :math:`W_0 + \frac{\alpha}{r} B A`. Of an AdaMixer with LORS, stage i gets as its own
    W_gen,i = W_shared + sum_k (B_i^k (.) A_i^k applied to the columns of E_i^k) from LORSA, and
    W_out,i = W_shared + B_i A_i from LORST. The sums are taken in float64, on the CPU as not every device has it, and
    rounded once.

    Args:
        model: one with LoRA, or a detector whose decoder has LORSA, LORST or both.
        dtype: data type of floating-point weights.
    """
    if any(hasattr(module, "lora_layers") for module in model.modules()):
        device, state = next(model.parameters()).device, merged(model).state_dict()
        return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in state.items()}
    decoder = model.decoder
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder.lorsa.", "decoder.lorst."))}
    state = {k: v.to(dtype, copy=True) if v.is_floating_point() else v.clone() for k, v in state.items()}
    for half, layer in ((decoder.lorsa, "parameter_generator"), (decoder.lorst, "out_proj")):
        if half is None:
            continue
        exact, device = deepcopy(half).cpu().double(), next(half.parameters()).device
        for i in range(half.num_layers):
            weight, bias = exact.fold(i)
            state[f"decoder.stages.{i}.mixing.{layer}.weight"] = weight.to(device, dtype)
            state[f"decoder.stages.{i}.mixing.{layer}.bias"] = bias.to(device, dtype)
    return state
