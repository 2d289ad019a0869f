"""Names and layouts of the reference implementations' weights (mmdet 2.x), in terms of ours."""

import re
from collections.abc import Mapping

from torch import Tensor

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
    hidden = {
        head: len({k for k in state_dict if re.match(_STAGE.replace(r"(\d+)", "0") + rf"{head}_fcs\.\d+\.", k)}) // 4
        for head in ("cls", "reg")
    }
    converted = {}
    for key, value in state_dict.items():
        if key in DROPPED:
            continue
        ours = rename(key, hidden)
        if ours is None:
            raise KeyError(f"{key} is no weight of the reference AdaMixer or LORS")
        if re.search(r"lorsa\.private\.\d+\.A\.", ours):
            value = value.unflatten(0, (num_groups, -1)).flatten(1, 2)
        elif re.search(r"lorsa\.private\.\d+\.B\.", ours):
            value = value.unflatten(0, (num_groups, -1)).transpose(1, 2).flatten(2)
        elif re.search(r"lorsa\.private\.\d+\.E\.", ours):
            r_squared = _core_size(state_dict, key)
            value = value.unflatten(0, (2, -1, r_squared)).transpose(0, 1).flatten(0, 2)
        converted[ours] = value
    return converted


def _core_size(state_dict: Mapping[str, Tensor], key: str) -> int:
    layer = re.match(_LORS + r"private_parameter_generator\.(\d+)\.", key).group(1)
    return state_dict[f"roi_head.adaptive_mixing.ml_parameters.{layer}"].shape[-1] ** 2
