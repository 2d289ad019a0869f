"""How many low-rank groups of which rank each layer of a stack owns."""

from collections.abc import Sequence

PerLayer = int | Sequence[int]


def per_layer(field: str, value: PerLayer, num_layers: int, minimum: int) -> list[int]:
    """One integer per layer, from one for all layers or a list.

    Args:
        field: name used in error messages.
        value: an integer, or one integer per layer.
        num_layers: layers in the stack.
        minimum: the smallest value allowed.

    Raises:
        ValueError: a list of another length, an entry that is not an integer or is below ``minimum``.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
        if len(values) != num_layers:
            raise ValueError(f"{field} has {len(values)} entries for {num_layers} stages")
    else:
        values = [value] * num_layers
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int):
            raise ValueError(f"{field} must hold integers, got {v!r}")
        if v < minimum:
            raise ValueError(f"{field} must be {minimum} or more, got {v}")
    return values


def allocation(rank: PerLayer, groups: PerLayer, num_layers: int, shared: bool) -> list[tuple[int, int]]:
    """(r_i, K_i) for every layer i; K_i = 0 leaves that layer with the shared part alone.

    Raises:
        ValueError: see :func:`per_layer`; also a stack without a shared part in which a layer has K = 0,
            for that layer would have no weight at all.
    """
    ranks = per_layer("rank", rank, num_layers, minimum=1)
    counts = per_layer("groups", groups, num_layers, minimum=0)
    if not shared and 0 in counts:
        raise ValueError(f"groups is 0 for stage {counts.index(0)} while shared is off: it would have no weight at all")
    return list(zip(ranks, counts, strict=True))
