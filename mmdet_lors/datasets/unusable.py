"""Images that cannot be used: each is replaced by another and logged once, and their number is limited."""

import logging
import traceback

import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log

from mmdet_lors.errors import UserError

MAX_UNUSABLE_SHARE = 0.01
"""Largest share of a data set's images that may be unusable, unless its config sets another."""


class UnusableImages:
    """Which images of a data set could not be used so far, known to all workers of its DataLoader.

    Args:
        images: how many images the data set has.
        max_share: largest share of them, 0 to 1, that may be unusable.
    """

    def __init__(self, images: int, max_share: float) -> None:
        self.max_share = max_share
        # One byte per image in shared memory: workers never write to the same place for different reasons.
        self.seen = torch.zeros(images, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return int(self.seen.sum())

    def add(self, index: int, name: str, error: Exception, trace: bool = False) -> None:
        """Note an unusable image.

        Args:
            index: its place in the data set.
            name: its file, for messages.
            error: why it cannot be used.
            trace: also log the error's traceback.

        Raises:
            UserError: more than ``max_share`` are unusable.
        """
        reason = reason_of(error)
        if not self.seen[index]:
            self.seen[index] = 1
            print_log(
                f"image {name} cannot be used, another one is used instead: {reason}; {len(self)} of "
                f"{len(self.seen)} so far" + (f"\n{traceback.format_exc()}" if trace else ""),
                logger="current",
                # Processes other than the first log nothing below an error.
                level=logging.WARNING if is_main_process() else logging.ERROR,
            )
        if len(self) > self.max_share * len(self.seen):
            raise UserError(
                f"{len(self)} of {len(self.seen)} images cannot be used, more than max_unusable_share "
                f"{self.max_share:g} allows; the last one is {name}: {reason}"
            ) from error


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def check_share(share: float) -> None:
    """Refuse a share that is not a number in [0, 1].

    Raises:
        UserError: names the field and the value.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise UserError(f"max_unusable_share must be in [0, 1], got {share!r}")
