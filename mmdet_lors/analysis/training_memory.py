"""What a training step has to keep, in bytes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class TrainingMemory(NamedTuple):
    """Bytes of a training step."""

    weights: int
    """Parameters, their gradients and the optimizer's state."""
    activations: int
    """What autograd keeps for the backward pass, at the batch that was measured."""

    def largest_batch(self, batch: int, other: "TrainingMemory") -> int:
        """How many images of this model fit into what another needs, both measured at ``batch`` images."""
        return batch * (other.weights + other.activations - self.weights) // self.activations


def training_memory(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> TrainingMemory:
    """Run one training step and count what is there at the end of its forward pass, or after its update.

    The peak of a step is a little above their sum, by what single operations need.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        loss: the forward pass.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    activations = sum(seen.values())
    value.backward()
    optimizer.step()
    parameters = list(model.parameters())
    kept = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    kept += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    optimizer.zero_grad()
    return TrainingMemory(sum(t.nbytes for t in kept), activations)
