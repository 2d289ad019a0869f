"""Warm start: a detector with LORS that comes as near as possible to a trained plain one with the same stages."""

from collections.abc import Mapping

from torch import Tensor, nn

from mmdet_lors.errors import UserError
from mmdet_lors.lors.warm_start import FitError, fit_lorsa_, fit_lorst_

WEIGHTS = ("M (channel mixing)", "S (spatial mixing)", "W_out (output projection)")
Errors = dict[tuple[int, str], FitError]
"""By stage and weight."""


def start_from_plain_(model: nn.Module, weights: Mapping[str, Tensor], turns: int = 20) -> Errors:
    """Fill a detector with LORS from a plain one's weights: what LORS shares is fitted, everything else is copied.

    Args:
        model: has a ``decoder`` with LORSA, LORST or both; filled in place.
        weights: state dict of the same model without LORS.
        turns: see :func:`mmdet_lors.lors.warm_start.fit_adaptive`.

    Returns:
        What the fit leaves over; what is copied is not listed.

    Raises:
        UserError: a weight to be copied is missing or has another shape.
    """
    copied = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder.lorsa.", "decoder.lorst."))}
    for key, value in copied.items():
        if key not in weights or weights[key].shape != value.shape:
            found = tuple(weights[key].shape) if key in weights else "missing"
            raise UserError(f"{key} is {found} in the plain AdaMixer, but LORS_CONFIG needs {tuple(value.shape)}")
    model.load_state_dict({k: weights[k] for k in copied}, strict=False)

    decoder, errors = model.decoder, {}

    def stack(layer: str) -> tuple[list[Tensor], list[Tensor]]:
        names = [f"decoder.stages.{i}.mixing.{layer}" for i in range(len(decoder.stages))]
        return [weights[f"{n}.weight"].float() for n in names], [weights[f"{n}.bias"].float() for n in names]

    if decoder.lorsa is not None:
        for i, pair in enumerate(fit_lorsa_(decoder.lorsa, *stack("parameter_generator"), turns=turns)):
            errors.update({(i, weight): error for weight, error in zip(WEIGHTS[:2], pair, strict=True)})
    if decoder.lorst is not None:
        for i, error in enumerate(fit_lorst_(decoder.lorst, *stack("out_proj"), turns=turns)):
            errors[i, WEIGHTS[2]] = error
    return errors
