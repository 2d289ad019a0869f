"""The line that training logs at each interval: what a person watches. ``scalars.json`` has everything."""

import re
from collections.abc import Iterator
from typing import Any

from mmdet.registry import LOG_PROCESSORS
from mmengine.runner import LogProcessor, Runner

from .machine import peak_resident

STAGE = re.compile(r"((?:.*[._])?)(?:stage|s|d)(\d+)[._](.+)")
"""A name of what one of many stages logs: stage5_loss_cls (AdaMixer), s2.loss_bbox (Cascade), d4.loss_iou (DETR)."""
ELSEWHERE = ("loss", "epoch", "iter", "time", "data_time", "grad_norm", "memory")
"""What the line has in another place, or not at all."""
DIGITS = 2
"""Decimals of a loss, or digits of a small one and of a learning rate."""


@LOG_PROCESSORS.register_module()
class ShortLogProcessor(LogProcessor):
    """mmengine's ``LogProcessor`` with a line for training that fits a screen.

    It has the total loss, every loss of a model without stages and the last stage's of one with stages, learning rate,
    time that is left, and the peak of memory: a GPU's, or else of this process. Visualizers, and with them
    ``scalars.json``, get what they get from mmengine's; other lines are mmengine's.
    """

    def get_log_after_iter(self, runner: Runner, batch_idx: int, mode: str) -> tuple[dict, str]:
        """As in mmengine."""
        tag, line = super().get_log_after_iter(runner, batch_idx, mode)
        if mode != "train":
            return tag, line
        where = re.search(r"\[[^]]*\](\[[^]]*\])?", line).group()  # [epoch][iteration/iterations]
        logged = {name.removeprefix("train/"): value for name, value in tag.items()}
        words = [where, *_losses(logged)]
        words += [f"{name} {value:.{DIGITS}g}" for name, value in logged.items() if name.endswith("lr")]
        if (eta := runner.message_hub.runtime_info.get("eta")) is not None:
            words.append(f"eta {_duration(int(eta))}")
        if memory := logged["memory"] * 2**20 if "memory" in logged else peak_resident():
            words.append(f"{memory / 1e9:.{int(memory < 1e10)}f}GB")
        return tag, " ".join(words)


def _losses(logged: dict[str, Any]) -> Iterator[str]:
    """Total loss first; of all that stages log, the last stage's losses alone, behind its number."""
    stages = {name: found.groups() for name in logged if (found := STAGE.fullmatch(name))}
    last: dict[str, int] = {}
    for prefix, number, _ in stages.values():
        last[prefix] = max(last.get(prefix, 0), int(number))
    if "loss" in logged:
        yield f"loss {_short(logged['loss'])}"
    stage = ""
    for name, value in logged.items():
        if name in ELSEWHERE or name.endswith("lr"):
            continue
        if name in stages:
            prefix, number, name = stages[name]
            # Where the last stage's losses have no number, all that have one are of stages before it.
            if int(number) < last[prefix] or prefix + name in logged or "loss" not in name:
                continue
            if stage != (stage := f"{prefix}s{number}"):
                yield stage
        yield f"{name.replace('loss_', '', 1)} {_short(value)}"


def _short(value: Any) -> str:
    """29.13, 0.51, 0.0051."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.{DIGITS}{'g' if 0 < abs(value) < 0.1 else 'f'}}"


def _duration(seconds: int) -> str:
    """26h03m, or 3m07s."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
