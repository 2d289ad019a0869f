"""Names and layouts of the reference implementations' weights (mmdet 2.x), in terms of ours."""

import re
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from mmdet_lors.errors import UserError

DROPPED = ("rpn_head.init_proposal_bboxes.weight",)
"""The constant initial positions, which we compute."""

_STAGE = r"roi_head\.bbox_head\.(\d+)\."
_LORS = r"roi_head\.adaptive_mixing\."
_RENAMES = [
    (r"(backbone\..*)", r"\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.", r"neck.convs.\1."),
    (r"neck\.gn_out\.", r"neck.norm."),
    (r"rpn_head\.init_content_features\.", r"query_generator.content."),
    (_STAGE + r"iof_tau", r"decoder.stages.\1.attention.tau"),
    (_STAGE + r"attention\.attn\.", r"decoder.stages.\1.attention."),
    (_STAGE + r"((?:attention_norm|ffn|ffn_norm)\.)", r"decoder.stages.\1.\2"),
    (_STAGE + r"(cls|reg)_fcs\.", r"decoder.stages.\1.\2_branch."),
    (
        _STAGE + r"sampling(?:_n_mixing)?\.sampling_offset_generator\.0\.",
        r"decoder.stages.\1.sampling.offset.",
    ),
    (_STAGE + r"sampling_n_mixing\.norm\.", r"decoder.stages.\1.mixing.norm."),
    (
        _STAGE + r"sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.",
        r"decoder.stages.\1.mixing.parameter_generator.",
    ),
    (_STAGE + r"sampling_n_mixing\.adaptive_mixing\.out_proj\.", r"decoder.stages.\1.mixing.out_proj."),
    (_LORS + r"common_parameter_generator\.", r"decoder.lorsa.shared."),
    (_LORS + r"private_parameter_generator\.(\d+)\.", r"decoder.lorsa.private.\1.E."),
    (_LORS + r"ml_parameters\.(\d+)", r"decoder.lorsa.private.\1.B.0"),
    (_LORS + r"mr_parameters\.(\d+)", r"decoder.lorsa.private.\1.A.0"),
    (_LORS + r"sl_parameters\.(\d+)", r"decoder.lorsa.private.\1.B.1"),
    (_LORS + r"sr_parameters\.(\d+)", r"decoder.lorsa.private.\1.A.1"),
    (_LORS + r"base_out_proj\.weight", r"decoder.lorst.shared"),
    (_LORS + r"out_weight_add_([AB])\.(\d+)", r"decoder.lorst.private.\2.\1"),
    (_LORS + r"out_weight_bias\.(\d+)", r"decoder.lorst.bias.\1"),
    (_LORS + r"out_norm\.(\d+)\.", r"decoder.stages.\1.mixing.norm."),
]
_LAST_LAYER = re.compile(_STAGE + r"fc_(cls|reg)\.(weight|bias)$")


def rename(key: str, hidden_layers: Mapping[str, int]) -> str | None:
    """Our name for one of the reference's, or None for a name it does not have.

    Args:
        key: a name from a reference checkpoint.
        hidden_layers: 'cls' and 'reg' -> hidden layers of that head; the last layer comes after them.
    """
    if match := _LAST_LAYER.match(key):
        stage, head, name = match.groups()
        return f"decoder.stages.{stage}.{head}_branch.{3 * hidden_layers[head]}.{name}"
    for pattern, ours in _RENAMES:
        if match := re.match(pattern, key):
            return match.expand(ours) + key[match.end() :]
    return None


def convert(state_dict: Mapping[str, Tensor], num_groups: int) -> dict[str, Tensor]:
    """A reference state dict under our names and in our layouts.

    Args:
        state_dict: keys and tensors of a reference AdaMixer or LORS detector, or a part of one.
        num_groups: sampling groups G, which the LORS tensors carry flattened with K.

    Raises:
        KeyError: a key that no reference model has.
    """
    hidden = _hidden_layers(state_dict)
    converted = {}
    for key, value in state_dict.items():
        if key in DROPPED:
            continue
        ours = rename(key, hidden)
        if ours is None:
            raise KeyError(f"{key} is not a weight of the reference AdaMixer or LORS")
        if re.search(r"lorsa\.private\.\d+\.A\.", ours):
            value = value.unflatten(0, (num_groups, -1)).flatten(1, 2)
        elif re.search(r"lorsa\.private\.\d+\.B\.", ours):
            value = value.unflatten(0, (num_groups, -1)).transpose(1, 2).flatten(2)
        elif re.search(r"lorsa\.private\.\d+\.E\.", ours):
            r_squared = _core_size(state_dict, key)
            value = value.unflatten(0, (2, -1, r_squared)).transpose(0, 1).flatten(0, 2)
        converted[ours] = value
    return converted


def settings(state_dict: Mapping[str, Tensor]) -> dict[str, dict]:
    """What a config says about a reference model, read off its weights' shapes.

    Returns:
        'query_generator' and 'decoder' as in our configs, the decoder with ``num_stages``, ``num_classes``, ``stage``
        and ``lors``; also 'neck' where the checkpoint has one.

    Raises:
        UserError: neither a reference AdaMixer nor a reference LORS, or a weight that is missing.
    """
    lors_key = "roi_head.adaptive_mixing.common_parameter_generator.weight"
    plain_key = "roi_head.bbox_head.0.sampling_n_mixing.adaptive_mixing.parameter_generator.0.weight"
    if lors_key not in state_dict and plain_key not in state_dict:
        raise UserError(f"not a reference AdaMixer or LORS: neither {plain_key} nor {lors_key} is in it")
    shape = partial(_shape, state_dict)
    num_stages = len({match.group(1) for key in state_dict if (match := re.match(_STAGE, key))})
    num_queries, content_dim = shape("rpn_head.init_content_features.weight", 2)
    levels = sum(bool(re.fullmatch(r"neck\.lateral_convs\.\d+\.conv\.weight", key)) for key in state_dict)
    # A decoder on its own does not say how wide the features are; AdaMixer takes them as wide as the content.
    feat_channels = shape("neck.gn_out.weight", 1)[0] if levels else content_dim
    lors = None
    if lors_key in state_dict:
        sampling, lors = _lors_settings(shape, num_stages)
    else:
        sampling = _plain_settings(shape, feat_channels)
    stage = "roi_head.bbox_head.0."
    found = dict(
        query_generator=dict(num_queries=num_queries, content_dim=content_dim),
        decoder=dict(
            num_stages=num_stages,
            num_classes=shape(stage + "fc_cls.weight", 2)[0],
            stage=dict(
                content_dim=content_dim,
                feat_channels=feat_channels,
                num_heads=shape(stage + "iof_tau", 1)[0],
                ffn_channels=shape(stage + "ffn.layers.0.0.weight", 2)[0],
                **sampling,
                **{f"num_{head}_fcs": count for head, count in _hidden_layers(state_dict).items()},
            ),
            lors=lors,
        ),
    )
    if levels:
        in_channels = [shape(f"neck.lateral_convs.{i}.conv.weight", 4)[1] for i in range(levels)]
        found["neck"] = dict(in_channels=in_channels, out_channels=feat_channels)
    return found


def _shape(state_dict: Mapping[str, Tensor], key: str, dims: int) -> tuple[int, ...]:
    if key not in state_dict:
        raise UserError(f"{key} is missing")
    if state_dict[key].ndim != dims or 0 in state_dict[key].shape:
        raise UserError(
            f"{key} has shape {tuple(state_dict[key].shape)}: it must have {dims} dimensions, none of them 0"
        )
    return tuple(state_dict[key].shape)


def _plain_settings(shape: Callable[[str, int], tuple[int, ...]], feat_channels: int) -> dict[str, int]:
    """G, P_in and P_out of plain AdaMixer, whose shapes hold them in products only.

    The sampling offsets have 3 G P_in rows, the output projection G P_out C columns, the parameter generator
    G (C C + P_out P_in) rows, of which the first part is (G C)^2 / G; G C is the features' width.
    """
    head = "roi_head.bbox_head.0.sampling_n_mixing."
    points = shape(head + "sampling_offset_generator.0.weight", 2)[0] // 3
    out_points = shape(head + "adaptive_mixing.out_proj.weight", 2)[1] // feat_channels
    rows_of_M = shape(head + "adaptive_mixing.parameter_generator.0.weight", 2)[0] - out_points * points
    num_groups = max(1, feat_channels**2 // max(1, rows_of_M))
    return dict(num_groups=num_groups, in_points=points // num_groups, out_points=out_points)


def _lors_settings(
    shape: Callable[[str, int], tuple[int, ...]], num_stages: int
) -> tuple[dict[str, int], dict[str, dict]]:
    """G, P_in and P_out of LORS, and our ``lors`` field: C, P_in and P_out are sizes of the private B and A."""
    head = "roi_head.adaptive_mixing."
    _, channels, _ = shape(head + "ml_parameters.0", 3)
    _, out_points, _ = shape(head + "sl_parameters.0", 3)
    _, _, in_points = shape(head + "sr_parameters.0", 3)
    num_groups = max(1, shape(head + "base_out_proj.weight", 2)[1] // (out_points * channels))
    private = [shape(f"{head}ml_parameters.{i}", 3) for i in range(num_stages)]
    lors = dict(
        adaptive=dict(rank=[r for _, _, r in private], groups=[copies // num_groups for copies, _, _ in private]),
        static=dict(rank=[shape(f"{head}out_weight_add_A.{i}", 2)[0] for i in range(num_stages)]),
    )
    return dict(num_groups=num_groups, in_points=in_points, out_points=out_points), lors


def _hidden_layers(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """'cls' and 'reg' -> hidden layers of that head; each is a Linear and a LayerNorm, two tensors both."""
    first = _STAGE.replace(r"(\d+)", "0")
    return {head: sum(bool(re.match(rf"{first}{head}_fcs\.", k)) for k in state_dict) // 4 for head in ("cls", "reg")}


def _core_size(state_dict: Mapping[str, Tensor], key: str) -> int:
    layer = re.match(_LORS + r"private_parameter_generator\.(\d+)\.", key).group(1)
    return state_dict[f"roi_head.adaptive_mixing.ml_parameters.{layer}"].shape[-1] ** 2
