"""What a config's schedule makes of the learning rate."""

from collections.abc import Sequence

import torch
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn


def learning_rates(schedulers: Sequence[dict], lr: float, epochs: int, iterations: int = 1) -> list[float]:
    """Learning rate at the start of each epoch, and at the end; with ``iterations``, of each of so many per epoch."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr)
    built = [dict(scheduler, optimizer=optimizer) for scheduler in schedulers]
    for scheduler in built:
        scheduler.pop("convert_to_iter_based", None)
        scheduler.update({key: iterations * scheduler[key] for key in ("begin", "end", "T_max") if key in scheduler})
    built = [PARAM_SCHEDULERS.build(scheduler) for scheduler in built]
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(epochs * iterations):
        for scheduler in built:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates
