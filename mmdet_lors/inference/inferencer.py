"""mmdet's DetInferencer with safe loading of checkpoints, folded LORS, images in any form, and thread safety."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from threading import RLock
from typing import Any

import mmcv
import mmengine
import numpy as np
from huggingface_hub import snapshot_download
from mmdet.apis import DetInferencer
from mmdet.models.detectors import BaseDetector
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from torch import nn

from mmdet_lors.datasets.exif import STORED
from mmdet_lors.engine.build import build_without_weights, one_at_a_time
from mmdet_lors.engine.checkpoint.config_and_weights import read_weights
from mmdet_lors.engine.checkpoint.model_folder import CONFIG, WEIGHTS
from mmdet_lors.engine.config_check import check_operators
from mmdet_lors.engine.launch import load_config
from mmdet_lors.engine.machine import usable
from mmdet_lors.engine.new_style import classic
from mmdet_lors.errors import UserError, first_line
from mmdet_lors.lors.serving import serve
from mmdet_lors.visualization.drawing import DRAWING, DetectionVisualizer
from mmdet_lors.visualization.output_names import OutputNames, as_picture, below, common_folder

from .pictures import Reader, Source, each, path_of
from .prepared import Prepared
from .sources import images_in


class Inferencer(DetInferencer):
    """A trained detector, ready to be called on images: ``Inferencer(config, checkpoint)("image.jpg")``.

    The call, its arguments and its result are those of mmdet's ``DetInferencer``; :meth:`stream` does the same without
    keeping results in memory. LORS is folded: as fast as the plain detector, with equal boxes.

    An image is a path, the bytes of an image file, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) in BGR or
    (H, W, 4) in BGRA, of uint8; docs/inference.md says by which rules other values are accepted or refused. Inputs are
    one image, a folder, or a list, tuple or generator of images and folders. Boxes are in the pixels of the image as it
    is shown: turned by its EXIF data, if the file or PIL image has any.

    Threads may share an Inferencer, or create several: they take turns where they must, and get the results that they
    would get one after another.

    Args:
        config: a config file, a config that has been read, or the folder of a published model
            (tools/model_converters/publish_model.py).
        checkpoint: its weights, a file or such a folder, which may be left out if ``config`` is one. Class names come
            from it, or else from the config's test data set.
        device: such as 'cpu', 'cuda:0', 'mps' or 'xpu'; None takes a GPU if mmengine finds one.
        palette: colours of the classes, as in ``DetInferencer``.
        show_progress: whether a call shows a progress bar.
        skip_unreadable: skip files that cannot be read or prepared instead of raising. ``unreadable`` has all that were
            skipped, with the reason, and a call's result has those of the call.

    Raises:
        UserError: a config without a detector, a checkpoint that cannot be read or is of another architecture, a
            device that does not exist; when called, an input that cannot be read as an image.
    """

    preprocess_kwargs = {"unreadable"}

    @one_at_a_time
    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path | None = None,
        device: str | None = None,
        palette: str = "none",
        show_progress: bool = True,
        skip_unreadable: bool = False,
    ) -> None:
        if checkpoint is None and (isinstance(config, Config) or not Path(config).is_dir()):
            raise UserError("a checkpoint is needed: only the folder of a published model has its own")
        checkpoint = config if checkpoint is None else checkpoint
        self.skip_unreadable = skip_unreadable
        self.unreadable: dict[str, str] = {}
        self._lock = RLock()
        self._names = OutputNames()
        self._named: dict[tuple[str, str, str], Path] = {}
        self._common: str | None = None
        config = classic(config) if isinstance(config, Config) else load_config(config)
        _check_config(config)
        super().__init__(
            model=config,
            weights=str(checkpoint),
            device=None if device is None else str(usable(device)),
            scope=config.get("default_scope") or "mmdet",
            palette=palette,
            show_progress=show_progress,
        )

    @classmethod
    def from_pretrained(cls, name: str, config: str | Path | Config | None = None, **settings: Any) -> "Inferencer":
        """A published model from Hugging Face's hub, downloaded once.

        Args:
            name: 'user/name', and '@' with a revision if that is not the newest.
            config: in place of the model's own, which is Python code and is executed.
            settings: further arguments of the class.

        Raises:
            UserError: it cannot be downloaded, or is not a model of this package.
        """
        repository, _, revision = name.partition("@")
        files = [WEIGHTS] if config is not None else [WEIGHTS, CONFIG]
        try:
            folder = snapshot_download(repository, revision=revision or None, allow_patterns=files)
        except (OSError, ValueError, RuntimeError) as error:  # no network, no such model, no right to it
            raise UserError(f"{name} cannot be downloaded: {first_line(error)}") from error
        return cls(folder if config is None else config, folder, **settings)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, by label."""
        return tuple(self.model.dataset_meta["classes"])

    @property
    def frame(self) -> str | None:
        """The frame of boxes that the config states, 'shown' or 'stored'; None if it states none, which means shown."""
        return self.cfg.test_dataloader.dataset.get("exif") if self.reader.turns else STORED

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=RLock())

    def __call__(self, inputs: Source | Iterable[Source], *args: Any, **kwargs: Any) -> dict:
        """As in mmdet: ``predictions`` and ``visualization``, in the order of the inputs.

        With ``skip_unreadable`` it also has ``unreadable``, the skipped files: name -> reason. With ``out_dir``, files
        are named by the images' paths below the folder that a call's images have in common.
        """
        unreadable: dict[str, str] = {}
        with self._lock:
            result = super().__call__(inputs, *args, unreadable=unreadable, **kwargs)
        return result | {"unreadable": unreadable} if self.skip_unreadable else result

    def stream(
        self, inputs: Source | Iterable[Source], batch_size: int = 1, workers: int = 0
    ) -> Iterator[tuple[Source, DetDataSample]]:
        """Each input with its predictions, on the CPU, as soon as its batch is done.

        ``pred_instances`` has ``bboxes`` (k, 4) as x1, y1, x2, y2 in pixels of the image, ``scores`` (k,) and
        ``labels`` (k,).

        Args:
            inputs: images; they are read as they are needed, a batch at a time.
            batch_size: how many images go through the detector at once, at most: only neighbours of one size do.
            workers: processes that read and prepare images ahead of the detector; the inputs are listed first.
        """
        for sources, data in self.preprocess(inputs, batch_size, workers=workers):
            yield from zip(sources, [sample.cpu() for sample in self.forward(data)], strict=True)

    def draw(self, source: Source, sample: DetDataSample, score_thr: float = 0.3) -> np.ndarray:
        """The image (H, W, 3), RGB, with the boxes whose score is above ``score_thr``; a small image is enlarged."""
        image = self.reader.colours(source)[..., ::-1]
        with DRAWING:
            self.visualizer.add_datasample("image", image, sample, draw_gt=False, pred_score_thr=score_thr)
            return self.visualizer.get_image()

    def forward(self, inputs: Any, **kwargs: Any) -> list[DetDataSample]:
        """Run the detector on one batch.

        Raises:
            UserError: a predicted class that has no name.
        """
        with self._lock:
            samples = super().forward(inputs, **kwargs)
        for sample in samples:
            if (sample.pred_instances.labels >= len(self.classes)).any():
                raise UserError(
                    f"the detector predicts class {int(sample.pred_instances.labels.max())}, "
                    f"but checkpoint and config name {len(self.classes)} classes"
                )
        return samples

    def preprocess(
        self, inputs: Any, batch_size: int = 1, unreadable: dict[str, str] | None = None, workers: int = 0
    ) -> Iterator:
        """Batches of (sources, data) for :meth:`forward`.

        Only images of one size share a batch: others would have to be padded, which changes their boxes.
        """
        usable = self._usable(self._prepared(inputs, workers), unreadable)
        for _, alike in groupby(usable, key=lambda item: item[1]["inputs"].shape):
            while batch := list(islice(alike, batch_size)):
                yield self.collate_fn(batch)

    def visualize(
        self,
        inputs: Sequence[Source],
        preds: Sequence[DetDataSample],
        return_vis: bool = False,
        show: bool = False,
        wait_time: float = 0,
        draw_pred: bool = True,
        pred_score_thr: float = 0.3,
        no_save_vis: bool = False,
        img_out_dir: str = "",
    ) -> list[np.ndarray] | None:
        """As in mmdet; each image has a file of its own."""
        folder = "" if no_save_vis else img_out_dir
        if not (show or folder or return_vis):
            return None
        drawn = []
        for source, sample in zip(inputs, preds, strict=True):
            path = path_of(source)
            name = self._name(folder, "vis", path, as_picture(Path(f"{self.num_visualized_imgs:08d}.jpg")))
            image = self.reader.colours(source)[..., ::-1]
            options = dict(show=show, wait_time=wait_time, draw_pred=draw_pred, pred_score_thr=pred_score_thr)
            with DRAWING:
                self.visualizer.add_datasample(
                    name.name, image, sample, draw_gt=False, out_file=str(name) if folder else None, **options
                )
                drawn.append(self.visualizer.get_image())
            self.num_visualized_imgs += 1
        return drawn

    def pred2dict(self, data_sample: DetDataSample, pred_out_dir: str = "") -> dict:
        """As in mmdet; each image has a file of its own."""
        result = super().pred2dict(data_sample)
        if pred_out_dir:
            name = self._name(
                pred_out_dir, "preds", data_sample.get("img_path"), Path(f"{self.num_predicted_imgs}.json")
            )
            self.num_predicted_imgs += 1
            if "panoptic_seg" in result:
                picture = str(name.with_name(f"{name.stem}_panoptic_seg.png"))
                mmcv.imwrite(result.pop("panoptic_seg")[:, :, ::-1], picture)
                result["panoptic_seg_path"] = picture
            mmengine.dump(result, str(name))
        return result

    def _name(self, folder: str, kind: str, path: str | None, numbered: Path) -> Path:
        """An image's output file, named by its path: the same file for the same path, a new one if it has no path."""
        root = Path(folder, kind)
        if path is None:
            return self._names.take(root / numbered)
        key = (folder, kind, path)
        if key not in self._named:
            where = root / below(path, self._common)
            plain, whole = where.with_suffix(".json"), where.with_name(where.name + ".json")
            self._named[key] = self._names.take(*([as_picture(where)] if kind == "vis" else [plain, whole]))
        return self._named[key]

    def _inputs_to_list(self, inputs: Any) -> list:
        listed = list(self._sources(inputs))
        folders = [Path(path).parent for path in map(path_of, listed) if path is not None and "://" not in path]
        self._common = common_folder([str(folder) for folder in folders])
        return listed

    def _sources(self, inputs: Any) -> Iterator:
        for source in each(inputs):
            path = path_of(source)
            yield from [source] if path is None or not Path(path).is_dir() else images_in(path)

    def _prepared(self, inputs: Any, workers: int) -> Iterable:
        if workers:
            return Prepared(self.reader, self.pipeline, list(self._sources(inputs))).ahead(workers)
        return map(Prepared(self.reader, self.pipeline, lock=self._lock).prepare, self._sources(inputs))

    def _usable(self, prepared: Iterable, unreadable: dict[str, str] | None) -> Iterator:
        """What could be prepared; files that could not are noted if they are to be skipped."""
        for source, data in prepared:
            if not isinstance(data, UserError):
                yield source, data
            elif self.skip_unreadable and (path := path_of(source)) is not None:
                for skipped in (self.unreadable, unreadable):
                    if skipped is not None:
                        skipped[path] = str(data).replace(path, "it", 1)
            else:
                raise data

    def _init_pipeline(self, cfg: Config) -> Compose:
        try:
            pipeline = super()._init_pipeline(cfg)
        except ValueError as error:
            place = "test_dataloader.dataset.pipeline"
            raise UserError(
                f"{cfg.filename or 'config'}: {place} has no LoadImageFromFile, which reads the image"
            ) from error
        loader = next(step for step in pipeline.transforms if hasattr(step, "from_file"))
        self.reader = Reader.of(loader.from_file)
        return pipeline

    def _init_model(self, cfg: Config, weights: str, device: str = "cpu") -> nn.Module:
        meant = build_without_weights(cfg.model)
        if not isinstance(meant, BaseDetector):
            raise UserError(f"model.type {cfg.model.type} is not a detector: it predicts no boxes")
        check_operators(meant, cfg.model, device)
        state_dict, meta = read_weights(weights, meant)
        if not {"dataset_meta", "CLASSES"} & set(meta):
            meta["dataset_meta"] = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True)).metainfo
        model = MODELS.build(cfg.model)
        self._load_weights_to_model(model, dict(state_dict=state_dict, meta=meta), cfg)
        model.cfg = cfg
        return serve(model.to(device).eval())

    def _init_collate(self, cfg: Config) -> Callable:
        # If there is none, mmengine looks for one in the wrong registry, and warns.
        return super()._init_collate(cfg) if cfg.test_dataloader.get("collate_fn") else pseudo_collate

    def _init_visualizer(self, cfg: Config) -> DetLocalVisualizer:
        # Not the config's visualizer: its back ends write into a run's folder.
        visualizer = DetectionVisualizer(name=f"inference-{id(self)}")
        visualizer.dataset_meta = self.model.dataset_meta
        return visualizer


def _check_config(cfg: Config) -> None:
    name = cfg.filename or "config"
    if cfg.get("model") is None:
        raise UserError(f"{name} has no model")
    if "pipeline" not in (cfg.get("test_dataloader") or {}).get("dataset", {}):
        raise UserError(f"{name} has no test_dataloader.dataset.pipeline, which says how an image is prepared")
