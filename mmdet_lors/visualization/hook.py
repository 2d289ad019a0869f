"""Draws pictures of predictions while a run validates and tests."""

from collections.abc import Sequence
from pathlib import Path

import mmcv
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmengine.fileio import get
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader, Dataset

from mmdet_lors.datasets.exif import STORED, frame_of
from mmdet_lors.errors import UserError

from .output_names import OutputNames, as_picture, below, image_folder


@HOOKS.register_module()
class PicturesHook(DetVisualizationHook):
    """mmdet's visualization hook, but every ``interval``-th image gets a picture and every picture is kept.

    A picture is named by the image's path below the data set's image folder: with its folders in ``test_out_dir``, as
    ``val_folder_name`` or ``test_folder_name`` in the visualizer's back ends. It draws segmentation as well.
    """

    def __init__(self, *args, **fields) -> None:
        super().__init__(*args, **fields)
        self._tags, self._files = OutputNames(), OutputNames()
        self._named: dict[tuple[str, int], tuple[str, Path]] = {}

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[BaseDataElement]
    ) -> None:
        """Draw every ``interval``-th image: the same ones in each validation."""
        if self.draw:
            self._draw("val", runner.val_dataloader, batch_idx, outputs, step=runner.iter)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[BaseDataElement]
    ) -> None:
        """Draw every ``interval``-th image, ground truth on the left and predictions on the right."""
        if self.draw:
            folder = Path(runner.work_dir, runner.timestamp, self.test_out_dir) if self.test_out_dir else None
            self._draw("test", runner.test_dataloader, batch_idx, outputs, folder=folder)

    def _draw(
        self,
        mode: str,
        loader: DataLoader,
        batch_idx: int,
        outputs: Sequence[BaseDataElement],
        folder: Path | None = None,
        step: int | None = None,
    ) -> None:
        for place, sample in enumerate(outputs, start=batch_idx * loader.batch_size):
            if place % self.interval:
                continue
            tag, name = self._names(mode, place, sample.img_path, loader)
            content = get(sample.img_path, backend_args=self.backend_args)
            image = mmcv.imfrombytes(content, _color_type(loader.dataset), channel_order="rgb")
            options = dict(show=self.show, wait_time=self.wait_time, step=place if step is None else step)
            if isinstance(sample, DetDataSample):
                options["pred_score_thr"] = self.score_thr
            file = folder and str(folder / name)
            try:
                self._visualizer.add_datasample(tag, image, data_sample=sample.cpu(), out_file=file, **options)
            except OSError as error:
                raise UserError(f"picture {file or tag} cannot be written: {error.strerror or error}") from error

    def _names(self, mode: str, place: int, path: str, loader: DataLoader) -> tuple[str, Path]:
        """The picture's name in the visualizer's back ends, and as a file."""
        if (mode, place) not in self._named:
            where = below(path, image_folder(loader.dataset))
            tag = self._tags.take(Path(f"{mode}_{'_'.join(where.parts)}"))
            self._named[mode, place] = str(tag), self._files.take(as_picture(where))
        return self._named[mode, place]


def _color_type(dataset: Dataset) -> str:
    """How a picture is read so that it is in the frame of the boxes."""
    while "pipeline" not in (fields := vars(dataset)):  # wrapped; mmengine's num_batch_per_epoch does so in _dataset
        inner = fields.get("datasets") or [fields.get("dataset", fields.get("_dataset"))]
        dataset = inner[0]
    return "color_ignore_orientation" if frame_of(dataset.pipeline.transforms) == STORED else "color"
