"""Folding: an AdaMixer with LORS is exactly some plain AdaMixer, bigger on disk and free of LORS's extra work."""

from copy import deepcopy

import torch
from torch import Tensor

from mmdet_lors.adamixer import QueryBased


def folded_config(model_cfg: dict) -> dict | None:
    """The plain model of the same groups and points; None for a model without LORS in an AdaMixer's decoder."""
    decoder = model_cfg.get("decoder") or {}
    return dict(model_cfg, decoder=dict(decoder, lors=None)) if decoder.get("lors") else None


@torch.no_grad()
def folded_state_dict(model: QueryBased, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of the plain detector that a detector with LORS is equal to; the detector is left as it is.

    Stage i gets as its own W_gen,i = W_shared + sum_k (B_i^k (.) A_i^k applied to the columns of E_i^k) from LORSA, and
    W_out,i = W_shared + B_i A_i from LORST. The sums are taken in float64, on the CPU as not every device has it, and
    rounded once.

    Args:
        model: a detector whose decoder has LORSA, LORST or both.
        dtype: data type of floating-point weights.
    """
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
