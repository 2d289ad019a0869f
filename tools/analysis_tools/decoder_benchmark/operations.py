"""Where a work's time goes on a CPU, operation by operation, and the rate of each kind of matrix product."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


@dataclass
class Operation:
    """All calls of one operation, or of one matrix product of the same shapes."""

    name: str
    shapes: str
    """Of a matrix product's factors; else empty."""
    calls: int = 0
    """A round."""
    seconds: float = 0
    """A round, without the operations that it calls."""
    multiply_adds: float = 0
    """A round; 0 if it is no matrix product."""


def operations(work: Callable[[], object], rounds: int) -> list[Operation]:
    """What a work does, the longest first, after one round that does not count.

    Shapes are of another round than times: while it records shapes, the profiler keeps all tensors, so that nothing of
    their memory is used again.

    Args:
        work: does the same operations every time.
        rounds: how often it is done.
    """
    work()
    found: dict[tuple[str, str], Operation] = {}
    shaped = _events(work, record_shapes=True, with_flops=True)
    timed = [_events(work) for _ in range(rounds)]
    for event, *times in zip(shaped, *timed, strict=True):
        shapes = ""
        if event.name in PRODUCTS:
            factors = [shape for shape in event.input_shapes if len(shape) > 1][-2:]
            shapes = " by ".join(" x ".join(map(str, shape)) for shape in factors)
        kind = found.setdefault((event.name, shapes), Operation(event.name.removeprefix("aten::"), shapes))
        kind.seconds += mean(time.self_cpu_time_total for time in times) / 1e6
        # The last product of what is computed again in the backward pass stops before it begins.
        if not shapes or any(called.name == "aten::resolve_conj" for called in event.cpu_children):
            kind.calls += 1
            kind.multiply_adds += event.flops / 2 if shapes else 0
    return sorted(found.values(), key=lambda kind: -kind.seconds)


def _events(work: Callable[[], object], **record: bool) -> list[FunctionEvent]:
    """PyTorch's operations of one round, in order."""
    with profile(activities=[ProfilerActivity.CPU], **record) as profiler:
        work()
    return [event for event in profiler.events() if event.name.startswith("aten::")]
