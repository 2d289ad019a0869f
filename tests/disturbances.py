"""What else may ask for gradients before ``loss.backward()``, for any loss of an input and parameters."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


def nothing(loss: Loss, x: Tensor, watched: Sequence[Tensor]) -> Tensor:
    return loss(x)


def gradient_of_the_input(loss: Loss, x: Tensor, watched: Sequence[Tensor]) -> Tensor:
    """Grad-CAM, an attack."""
    value = loss(x)
    torch.autograd.grad(value, x, retain_graph=True)
    return value


def gradient_of_parameters(loss: Loss, x: Tensor, watched: Sequence[Tensor]) -> Tensor:
    """GradNorm; also of a part of them."""
    value = loss(x)
    torch.autograd.grad(value, watched, retain_graph=True)
    torch.autograd.grad(value, watched[:1], retain_graph=True)
    return value


def partial_backward(loss: Loss, x: Tensor, watched: Sequence[Tensor]) -> Tensor:
    value = loss(x)
    value.backward(inputs=list(watched[:1]), retain_graph=True)
    watched[0].grad = None
    return value


def retained_graph(loss: Loss, x: Tensor, watched: Sequence[Tensor]) -> Tensor:
    """The gradients of two backward passes add up."""
    value = loss(x)
    value.backward(retain_graph=True)
    return value


def gradient_penalty(loss: Loss, x: Tensor, watched: Sequence[Tensor]) -> Tensor:
    """Double backward."""
    value = loss(x)
    gradients = torch.autograd.grad(value, watched, create_graph=True)
    return value + sum(g.square().sum() for g in gradients)


def interrupted(loss: Loss, x: Tensor, watched: Sequence[Tensor]) -> Tensor:
    """An exception in the middle of a backward pass: out of memory, Ctrl-C. Then the same graph again."""
    value, before = loss(x), [(t, t.grad) for t in watched]

    def stop(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    hook = watched[-1].register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        value.backward(retain_graph=True)
    hook.remove()
    for t, gradient in before:
        t.grad = gradient
    return value


def interrupted_step(loss: Loss, x: Tensor, watched: Sequence[Tensor]) -> Tensor:
    """The same, and then a new forward pass."""
    interrupted(loss, x, watched)
    return loss(x)


DISTURBANCES = [
    nothing,
    gradient_of_the_input,
    gradient_of_parameters,
    partial_backward,
    retained_graph,
    gradient_penalty,
    interrupted,
    interrupted_step,
]


def gradients(
    disturb: Callable, model: nn.Module, loss: Loss, x: Tensor, watched: Sequence[Tensor]
) -> dict[str, Tensor]:
    """What ``backward()`` leaves in a model's parameters and the input after a disturbance."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    value = disturb(loss, x, watched)
    if disturb in (interrupted, interrupted_step):
        model.zero_grad()
        x.grad = None
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found if x.grad is None else dict(found, x=x.grad)


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Over all tensors, the norm of the difference over the norm (and 1e-6, for those that only rounding moves)."""
    assert ours.keys() == theirs.keys() and len(ours) > 3
    return max(((ours[k] - theirs[k]).norm() / (theirs[k].norm() + 1e-6)).item() for k in ours)
