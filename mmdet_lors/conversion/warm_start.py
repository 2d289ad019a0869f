"""Warm start: a detector with LORS that comes as near as possible to a trained plain one with the same stages."""

from collections.abc import Mapping

from torch import Tensor, nn

from mmdet_lors.errors import UserError
from mmdet_lors.lors.budget import Size, adaptive_sizes, spend, static_sizes, sum_of_squares
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
    if decoder.lorsa is not None:
        generators = _stack(weights, "parameter_generator", decoder.lorsa.num_layers)
        for i, pair in enumerate(fit_lorsa_(decoder.lorsa, *generators, turns=turns)):
            errors.update({(i, weight): error for weight, error in zip(WEIGHTS[:2], pair, strict=True)})
    if decoder.lorst is not None:
        projections = _stack(weights, "out_proj", decoder.lorst.num_layers)
        for i, error in enumerate(fit_lorst_(decoder.lorst, *projections, turns=turns)):
            errors[i, WEIGHTS[2]] = error
    return errors


def _stack(weights: Mapping[str, Tensor], layer: str, stages: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of one layer of every stage."""
    names = [f"decoder.stages.{i}.mixing.{layer}" for i in range(stages)]
    return [weights[f"{n}.weight"].float() for n in names], [weights[f"{n}.bias"].float() for n in names]


def lors_for_budget(model: nn.Module, weights: Mapping[str, Tensor], parameters: float) -> dict[str, dict]:
    """K and r of every stage with which the model comes nearest to a plain one, within a number of parameters.

    Errors are squared, relative to each stage's own weight, and added up over stages and both halves; sizes, and the
    rule that chooses between them, are in :mod:`mmdet_lors.lors.budget`.

    Args:
        model: has a ``decoder`` with LORSA, LORST or both, each with a shared part; may be on the meta device.
        weights: state dict of the same model without LORS.
        parameters: of the whole model.

    Returns:
        ``rank`` and ``groups`` of the halves that it has, as fields of ``decoder.lors`` in its config.

    Raises:
        UserError: a budget below what the model needs without private parts; a half without a shared part.
    """
    lorsa, lorst = model.decoder.lorsa, model.decoder.lorst
    for name, half in dict(adaptive=lorsa, static=lorst).items():
        if half is not None and half.shared is None:
            raise UserError(f"a budget needs shared weights, but lors.{name} has shared=False")
    least = sum(p.numel() for name, p in model.named_parameters() if ".private." not in name)
    if parameters < least:
        raise UserError(f"{parameters:,.0f} parameters are below the {least:,} of LORS_CONFIG without private parts")
    sizes: list[tuple[str, float, list[Size]]] = []
    if lorsa is not None:
        generators, biases = _stack(weights, "parameter_generator", lorsa.num_layers)
        wholes = [sum_of_squares(pair) for pair in zip(generators, biases, strict=True)]
        stages = adaptive_sizes(lorsa, generators, biases)
        sizes += [("adaptive", *stage) for stage in zip(wholes, stages, strict=True)]
    if lorst is not None:
        projections, _ = _stack(weights, "out_proj", lorst.num_layers)
        wholes = [sum_of_squares([weight]) for weight in projections]
        sizes += [("static", *stage) for stage in zip(wholes, static_sizes(projections), strict=True)]
    options = [[(size.cost, size.error / (whole or 1.0)) for size in stage] for _, whole, stage in sizes]
    chosen, _ = spend(options, parameters - least)
    fields: dict[str, dict] = {}
    for (half, _, stage), i in zip(sizes, chosen, strict=True):
        field = fields.setdefault(half, dict(rank=[], groups=[]))
        field["rank"].append(stage[i].rank)
        field["groups"].append(stage[i].groups)
    return fields
