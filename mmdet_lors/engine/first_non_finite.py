"""Finds the first non-finite tensor of a training step, by running the step again and watching every module."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

KEPT = 3
"""How many names of one kind are listed."""


def first_non_finite(
    model: BaseModel, batch: Any, context: AbstractContextManager, loss_scale: float = 1.0
) -> list[str]:
    """Run the forward and backward pass again and name what is not finite, the likely cause first.

    Nothing is updated, and no other process takes part: in distributed training, losses are normalised by this
    process's batch only. To repeat the step exactly, random numbers must be in the state that they had before it.

    Args:
        model: without a wrapper for distributed training.
        batch: what the DataLoader returned.
        context: the optimizer wrapper's ``optim_context``, for mixed precision.
        loss_scale: what the loss is multiplied with before the backward pass, for float16.

    Returns:
        What is not finite, in this order: weights; images and boxes; the outputs of modules, in the order of their
        calls; losses; gradients of modules' outputs, from the loss backwards; gradients of weights; buffers, which a
        forward pass may have corrupted. Empty if everything is finite.
    """
    found = _named("weight", [name for name, weight in model.named_parameters() if not _finite(weight)])
    outputs, backwards, losses = [], [], []

    def watch(name: str, module: nn.Module):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in tensors(output):
                if not _finite(tensor):
                    outputs.append(f"{name} ({type(module).__name__})")
                    return
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: None if _finite(grad) else backwards.append(name))

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if name and name != "data_preprocessor"]
    gradients = []
    failure = None
    try:
        # Without the other processes: they may have stopped, or be elsewhere in the code.
        with (
            patch.object(torch.distributed, "is_initialized", return_value=False),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
        ):
            with context:
                data = model.data_preprocessor(batch, True)
                found += _inputs(data)
                terms = model(**data, mode="loss")
            losses = [name for name, value in terms.items() if not all(_finite(t) for t in tensors(value))]
            if not (outputs or losses):
                loss, _ = model.parse_losses(terms)
                trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
                # Not backward(): it would trigger DistributedDataParallel's hooks and write gradients.
                grads = torch.autograd.grad(loss * loss_scale, list(trained.values()), allow_unused=True)
                gradients = [n for n, g in zip(trained, grads, strict=True) if g is not None and not _finite(g)]
    except Exception as error:  # no failure here may hide why the run stops
        failure = f"running the step again failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for handle in handles:
            handle.remove()
    found += _named("output of", outputs)
    found += _named("loss", losses)
    found += _named("gradient of the output of", backwards)
    found += _named("gradient of weight", gradients)
    found += _named("buffer", [name for name, buffer in model.named_buffers() if not _finite(buffer)])
    return found + ([failure] if failure and found else [])


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def _inputs(data: dict) -> list[str]:
    """The images and boxes of a batch that are not finite, by their place in it."""
    images = data.get("inputs") if isinstance(data, dict) else None
    samples = data.get("data_samples") if isinstance(data, dict) else None
    bad = [f"{i}" for i, image in enumerate(images if images is not None else ()) if not _finite(image)]
    boxes = [getattr(getattr(sample, "gt_instances", None), "bboxes", None) for sample in _listed(samples)]
    boxes = [getattr(box, "tensor", box) for box in boxes]
    worse = [f"{i}" for i, box in enumerate(boxes) if isinstance(box, Tensor) and not _finite(box)]
    return _named("pixels of the batch's image", bad) + _named("boxes of the batch's image", worse)


def _listed(samples: Any) -> list:
    return samples if isinstance(samples, list) else []


def _finite(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.detach()).all())


def _named(what: str, names: list[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    if not names:
        return []
    more = f" and {len(names) - KEPT} more" if len(names) > KEPT else ""
    return [f"{what} {', '.join(names[:KEPT])}{more}"]
