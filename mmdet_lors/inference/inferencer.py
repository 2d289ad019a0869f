"""mmdet's DetInferencer with our safe reader of checkpoints, LORS served folded, and small images drawn enlarged."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmdet.apis import DetInferencer
from mmdet.models.detectors import BaseDetector
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import nn

from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.hooks import enlarged
from mmdet_lors.engine.launch import load_config
from mmdet_lors.engine.trained import read_weights
from mmdet_lors.errors import UserError
from mmdet_lors.lors.serving import serve

Source = str | np.ndarray
"""An image: its path, or (H, W, 3), BGR, uint8, as OpenCV reads it."""


class _Visualizer(DetLocalVisualizer):
    """mmdet's visualizer; small images are drawn enlarged, as labels would cover them."""

    def add_datasample(
        self, name: str, image: np.ndarray, data_sample: DetDataSample | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if data_sample is not None:
            image, data_sample = enlarged(image, data_sample.cpu())
        super().add_datasample(name, image, data_sample, *args, **kwargs)


class Inferencer(DetInferencer):
    """A trained detector, ready to be called on images: ``Inferencer(config, checkpoint)("image.jpg")``.

    The call, its arguments and its result are those of mmdet's ``DetInferencer``; :meth:`stream` is the same without
    keeping anything. LORS is folded: as fast as the plain detector, equal boxes.

    Args:
        config: a config file, or a config that was read already.
        checkpoint: its weights. Class names come from it, or else from the config's test data set.
        device: such as 'cpu' or 'cuda:0'; None takes a GPU if there is one.
        palette: colours of the classes, as in ``DetInferencer``.
        show_progress: whether a call shows a progress bar.
        skip_unreadable: leave out files that are no images, and list them in ``unreadable``, instead of raising.

    Raises:
        UserError: a config without a detector, a checkpoint that cannot be read or is of another architecture, a
            device that is not there; when called, a file that cannot be read as an image.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path,
        device: str | None = None,
        palette: str = "none",
        show_progress: bool = True,
        skip_unreadable: bool = False,
    ) -> None:
        self.skip_unreadable = skip_unreadable
        self.unreadable: list[str] = []
        if not isinstance(config, Config):
            config = load_config(config)
        _check_config(config)
        super().__init__(
            model=config,
            weights=str(checkpoint),
            device=_usable(device),
            scope=config.get("default_scope", "mmdet"),
            palette=palette,
            show_progress=show_progress,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, by label."""
        return tuple(self.model.dataset_meta["classes"])

    def stream(self, inputs: Iterable[Source], batch_size: int = 1) -> Iterator[tuple[Source, DetDataSample]]:
        """Each input with its predictions, on the CPU, as soon as its batch is done.

        ``pred_instances`` has ``bboxes`` (k, 4) as x1, y1, x2, y2 in pixels of the image, ``scores`` (k,) and
        ``labels`` (k,).

        Args:
            inputs: images; they are taken as they are needed, a batch at a time.
            batch_size: how many go through the detector at once, at most: only neighbours of one size do.
        """
        for sources, data in self.preprocess(inputs, batch_size):
            yield from zip(sources, [sample.cpu() for sample in self.forward(data)], strict=True)

    def draw(self, source: Source, sample: DetDataSample, score_thr: float = 0.3) -> np.ndarray:
        """The image (H, W, 3), RGB, with the boxes whose score is above ``score_thr``; a small image comes enlarged."""
        image = source[..., ::-1] if isinstance(source, np.ndarray) else mmcv.imread(source, channel_order="rgb")
        self.visualizer.add_datasample("image", image, sample, draw_gt=False, pred_score_thr=score_thr)
        return self.visualizer.get_image()

    def forward(self, inputs: Any, **kwargs: Any) -> list[DetDataSample]:
        """One batch through the detector.

        Raises:
            UserError: a predicted class that has no name.
        """
        samples = super().forward(inputs, **kwargs)
        for sample in samples:
            if (sample.pred_instances.labels >= len(self.classes)).any():
                raise UserError(
                    f"the detector predicts class {int(sample.pred_instances.labels.max())}, "
                    f"but checkpoint and config name {len(self.classes)} classes"
                )
        return samples

    def visualize(self, inputs: Sequence[Source], *args: Any, **kwargs: Any) -> list[np.ndarray] | None:
        """As in mmdet, which takes arrays to be RGB here, and BGR where it predicts."""
        return super().visualize([i[..., ::-1] if isinstance(i, np.ndarray) else i for i in inputs], *args, **kwargs)

    def _get_chunk_data(self, inputs: Iterable, chunk_size: int) -> Iterator[list]:
        """Batches of (input, what the pipeline made of it), without what cannot be read.

        Only images of one size share a batch: others would be padded to one, which changes their boxes.
        """
        prepared = (item for source in inputs for item in self._prepare(source))
        for _, alike in groupby(prepared, key=lambda item: item[1]["inputs"].shape):
            while batch := list(islice(alike, chunk_size)):
                yield batch

    def _prepare(self, source: Any) -> list:
        try:
            return next(super()._get_chunk_data([source], 1))
        except Exception as error:
            if not isinstance(source, str) or _readable(source):
                raise
            if not self.skip_unreadable:
                raise UserError(f"{source} cannot be read as an image") from error
            self.unreadable.append(source)
            return []

    def _init_model(self, cfg: Config, weights: str, device: str = "cpu") -> nn.Module:
        meant = build_without_weights(cfg.model)
        if not isinstance(meant, BaseDetector):
            raise UserError(f"model.type {cfg.model.type} is no detector: it predicts no boxes")
        state_dict, meta = read_weights(weights, meant)
        if not {"dataset_meta", "CLASSES"} & set(meta):
            meta["dataset_meta"] = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True)).metainfo
        model = MODELS.build(cfg.model)
        self._load_weights_to_model(model, dict(state_dict=state_dict, meta=meta), cfg)
        model.cfg = cfg
        return serve(model.to(device).eval())

    def _init_collate(self, cfg: Config) -> Callable:
        # mmengine looks for a missing one in the wrong registry, and warns.
        return super()._init_collate(cfg) if cfg.test_dataloader.get("collate_fn") else pseudo_collate

    def _init_visualizer(self, cfg: Config) -> DetLocalVisualizer:
        # Not the config's: its back ends write into a run's folder.
        visualizer = _Visualizer(name=f"inference-{id(self)}")
        visualizer.dataset_meta = self.model.dataset_meta
        return visualizer


def _check_config(cfg: Config) -> None:
    name = cfg.filename or "config"
    if cfg.get("model") is None:
        raise UserError(f"{name} has no model")
    if "pipeline" not in (cfg.get("test_dataloader") or {}).get("dataset", {}):
        raise UserError(f"{name} has no test_dataloader.dataset.pipeline, which says how an image is prepared")


def _usable(device: str | None) -> str | None:
    """The device, if this machine has it."""
    if device is None:
        return None
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is not known: cpu, cuda or cuda:N") from error
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= count:
            has = f"{count} GPU(s): cuda:0 to cuda:{count - 1}" if count else "no GPU that PyTorch can use: take cpu"
            raise UserError(f"device {device}: this machine has {has}")
    return device


def _readable(path: str) -> bool:
    try:
        return mmcv.imread(path) is not None
    except Exception:
        return False
