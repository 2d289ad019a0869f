"""Images read and prepared for a detector, in this process or by workers ahead of it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import cv2
from mmengine.dataset import Compose
from torch.utils.data import DataLoader, Dataset

from mmdet_lors.datasets.unusable import reason_of
from mmdet_lors.errors import UserError

from .pictures import Reader, name_of, path_of

TOGETHER = 8
"""How many images a worker passes on at a time: one by one would cost as much as preparing a small image does."""


@dataclass
class Prepared(Dataset):
    """Each source with what the pipeline makes of it, or with the error that says why it cannot be read or prepared.

    Args:
        reader: reads the images.
        pipeline: prepares them.
        sources: images, or dicts with one as ``img`` or ``img_path``.
        lock: held while the pipeline is used.
    """

    reader: Reader
    pipeline: Compose
    sources: Sequence[Any] = ()
    lock: AbstractContextManager = field(default_factory=nullcontext)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Any, dict | UserError]:
        return self.prepare(self.sources[index])

    def prepare(self, source: Any) -> tuple[Any, dict | UserError]:
        """One source with its data or error."""
        fields = dict(source) if isinstance(source, dict) else {}
        source = fields.pop("img", fields.pop("img_path", None)) if fields else source
        try:
            image = self.reader(source)
        except UserError as error:
            return source, error
        try:
            with self.lock:
                data = self.pipeline(dict(fields, img=image))
        except Exception as error:
            size = f"{image.shape[1]} x {image.shape[0]} pixels"
            return source, UserError(
                f"{name_of(source)}, {size}, cannot be prepared for the detector: {reason_of(error)}"
            )
        if "img_path" in data["data_samples"]:
            data["data_samples"].set_metainfo(dict(img_path=path_of(source)))
        return source, data

    def ahead(self, workers: int) -> Iterator[tuple[Any, dict | UserError]]:
        """The same in the same order, by worker processes, each of which has up to 2 x ``TOGETHER`` ready."""
        loader = DataLoader(self, TOGETHER, num_workers=workers, collate_fn=_unchanged, worker_init_fn=_use_one_thread)
        return chain.from_iterable(loader)


def _unchanged(items: list) -> list:
    return items


def _use_one_thread(_: int) -> None:
    cv2.setNumThreads(0)  # as torch in its workers; OpenCV's threads do not outlive a fork
