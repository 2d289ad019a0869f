"""What the decoder study runs: frozen features of the digits, and decoders that are trained on them from scratch."""

import contextlib
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_checkpoint
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from mmdet_lors.analysis.study import call, evaluate, last_epoch_only, once, read, train
from mmdet_lors.conversion.warm_start import start_from_plain_
from mmdet_lors.engine.cpu import keep_memory
from mmdet_lors.errors import first_line

from .rows import Bench, Row

PLAIN = "configs/adamixer/adamixer_r18_digits.py"
SPLITS = ("train", "val")
RESAMPLES = 20
"""Draws of validation images, from which the standard error of AP is taken."""


def config(bench: Bench, decoder: dict) -> Config:
    """The config of a row, or of the plain decoder of six stages without settings."""
    cfg = deepcopy(read(PLAIN))
    cfg.model.decoder.num_stages = 6
    cfg.model.backbone = cfg.model.neck = None
    cfg.merge_from_dict({f"model.decoder.{name}": value for name, value in decoder.items()})
    cfg.model.query_generator.num_queries = bench.queries
    cfg.model.query_generator.content_dim = cfg.model.decoder.stage.content_dim
    cfg.optim_wrapper.optimizer.lr = bench.learning_rate
    return cfg


# The features, once for all runs.


def prepare(bench: Bench, folder: Path, device: str = "cpu") -> dict:
    """Make the digits, train the detector whose backbone and neck all runs use, and keep what these compute.

    Args:
        bench: sizes.
        folder: where all of it is kept; what is there is not made again.
        device: of the features; training and test choose their own.

    Returns:
        AP of that detector, the seconds that all of this took, and a digest of the features.

    Raises:
        UserError: training or evaluation failed; names the log.
    """

    def work() -> dict:
        begin, data, log = time.monotonic(), folder / "digits", folder / "log.txt"
        sizes = ("--train-images", bench.train_images, "--val-images", bench.val_images, "--size", bench.size)
        call("tools/dataset_converters/digits_to_coco.py", "--out", str(data), *map(str, sizes), log=log)
        options = [f"{split}_dataloader.dataset.data_root={data}/" for split in (*SPLITS, "test")]
        options += [f"{split}_evaluator.ann_file={data}/annotations/val.json" for split in ("val", "test")]
        steps = dict(train=2, val=1, test=1)  # of the pipelines, which resize
        scale = f"({bench.size},{bench.size})"
        options += [f"{split}_dataloader.dataset.pipeline.{step}.scale={scale}" for split, step in steps.items()]
        (folder / "features").mkdir(exist_ok=True)
        epochs = bench.feature_epochs
        schedule = [f"train_cfg.max_epochs={epochs}", *last_epoch_only(epochs)]
        schedule += [f"param_scheduler.1.T_max={epochs}", f"param_scheduler.1.end={epochs}"]
        train(PLAIN, folder / "features", options + schedule, threads=torch.get_num_threads())
        checkpoint = folder / "features" / f"epoch_{epochs}.pth"
        found = evaluate(PLAIN, checkpoint, folder / "features", options)
        for split in SPLITS:
            keep_features(checkpoint, data, split, folder, device)
        digest = hashlib.sha256((folder / "val.npy").read_bytes()).hexdigest()
        return dict(ap=found["coco/bbox_mAP"], seconds=time.monotonic() - begin, digest=digest)

    return once(folder, work)


@torch.no_grad()
def keep_features(checkpoint: Path, data: Path, split: str, folder: Path, device: str) -> None:
    """Write what the frozen backbone and neck compute: ``{split}.npy``, (images, channels, cells), and its objects."""
    register_all_modules()
    cfg = deepcopy(read(PLAIN))
    model = MODELS.build(cfg.model).eval().to(device)
    load_checkpoint(model, str(checkpoint), map_location="cpu")
    size = json.loads((data / "annotations" / f"{split}.json").read_text())["images"][0]["width"]
    settings = cfg.val_dataloader.dataset
    settings.update(data_root=f"{data}/", ann_file=f"annotations/{split}.json", data_prefix=dict(img=f"{split}/"))
    settings.pipeline[1].scale = (size, size)
    images, objects, kept = DATASETS.build(settings), [], None
    for first in range(0, len(images), 50):
        batch = [images[i] for i in range(first, min(first + 50, len(images)))]
        batch = model.data_preprocessor(pseudo_collate(batch))
        feats = model.extract_feat(batch["inputs"])
        cells = torch.cat([feat.flatten(2) for feat in feats], dim=2).half().cpu().numpy()
        if kept is None:
            shape = (len(images), *cells.shape[1:])
            kept = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.float16, shape)
        kept[first : first + len(cells)] = cells
        for sample in batch["data_samples"]:
            found = sample.gt_instances
            objects.append(dict(boxes=found.bboxes.cpu(), labels=found.labels.cpu(), id=sample.img_id))
    sides = [feat.shape[-1] for feat in feats]
    torch.save(dict(objects=objects, sides=sides, size=size), folder / f"{split}.pth")


class Features:
    """The pyramids of a split, read from disk as they are asked for, and its objects.

    Args:
        folder: where :func:`keep_features` wrote them.
        split: 'train' or 'val'.
        device: where batches are put.
    """

    def __init__(self, folder: Path, split: str, device: str) -> None:
        self.cells = np.load(folder / f"{split}.npy", mmap_mode="r")
        kept = torch.load(folder / f"{split}.pth", weights_only=True)
        self.sides, self.device = kept["sides"], device
        shape = (kept["size"], kept["size"])
        self.ids = [found["id"] for found in kept["objects"]]
        self.samples = []
        for found in kept["objects"]:
            sample = DetDataSample(metainfo=dict(img_shape=shape, scale_factor=(1.0, 1.0)))
            sample.gt_instances = InstanceData(bboxes=found["boxes"], labels=found["labels"])
            self.samples.append(sample.to(device))

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, list[DetDataSample]]:
        """(B, channels, cells of all levels), and samples."""
        cells = torch.from_numpy(self.cells[rows]).to(self.device).float()
        return cells, [self.samples[i] for i in rows]

    def shuffled(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, list[DetDataSample]]]:
        """Batches without end, each epoch in another order."""
        numbers = np.random.default_rng(seed)
        while True:
            order = numbers.permutation(len(self))
            for first in range(0, len(order) - batch_size + 1, batch_size):
                yield self.batch(np.sort(order[first : first + batch_size]))


# One run.


class Trained(nn.Module):
    """What a run trains: queries and decoder, behind a 1 x 1 convolution where the decoder takes fewer channels.

    Args:
        model: config of the detector.
        channels: of the features.
        sides: of their levels.
    """

    def __init__(self, model: Config, channels: int, sides: Sequence[int]) -> None:
        super().__init__()
        self.query_generator = MODELS.build(model.query_generator)
        settings = dict(train_cfg=model.train_cfg, test_cfg=model.test_cfg)
        self.decoder = MODELS.build(model.decoder, default_args=settings)
        self.query_generator.init_weights()
        self.decoder.init_weights()
        width, self.sides = model.decoder.stage.feat_channels, sides
        self.narrow = nn.Identity() if width == channels else nn.Conv1d(channels, width, 1)

    def start(self, cells: Tensor, samples: Sequence[DetDataSample]) -> tuple:
        """Feature levels, initial positions and content."""
        levels = self.narrow(cells).split([side * side for side in self.sides], dim=2)
        feats = [level.unflatten(2, (side, side)) for level, side in zip(levels, self.sides, strict=True)]
        return feats, *self.query_generator([sample.img_shape for sample in samples])

    def parameters_of_decoder(self) -> int:
        """Of the decoder, and of what narrows its features."""
        return sum(p.numel() for part in (self.decoder, self.narrow) for p in part.parameters())


def learn(bench: Bench, row: Row, model: Trained, features: Features, iterations: int, seed: int) -> None:
    """Train; the learning rate rises linearly, then falls to zero along a cosine."""
    cfg = config(bench, {})
    if row.optimizer:  # mmengine makes a group of each parameter, which costs a tenth of an iteration
        cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=row.optimizer)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    rising = max(1, round(row.warm_up * iterations))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer.optimizer,
        lambda i: min(1.0, (i + 1) / rising) * (1 + math.cos(math.pi * i / iterations)) / 2,
    )
    model.train()
    for _, (cells, samples) in zip(range(iterations), features.shuffled(bench.batch_size, seed), strict=False):
        losses = model.decoder.loss(*model.start(cells, samples), samples)
        total = sum(value for name, value in losses.items() if "loss" in name)
        if not torch.isfinite(total):
            raise FloatingPointError(f"loss is {total.item()}")
        optimizer.update_params(total)
        schedule.step()


@torch.no_grad()
def judge(model: Trained, features: Features, truth: Path) -> dict[str, float]:
    """AP, AP50, and the standard error of AP from which images happened to be validated on (bootstrap)."""
    model.eval()
    results = []
    for first in range(0, len(features), 50):
        rows = np.arange(first, min(first + 50, len(features)))
        cells, samples = features.batch(rows)
        for row, found in zip(rows, model.decoder.predict(*model.start(cells, samples), samples), strict=True):
            boxes = torch.cat([found.bboxes[:, :2], found.bboxes[:, 2:] - found.bboxes[:, :2]], dim=1).tolist()
            results += [
                dict(image_id=features.ids[row], category_id=label + 1, bbox=box, score=score)
                for box, label, score in zip(boxes, found.labels.tolist(), found.scores.tolist(), strict=True)
            ]
    with contextlib.redirect_stdout(io.StringIO()):
        truths = COCO(truth)
        evaluation = COCOeval(truths, truths.loadRes(results), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
        ap, ap50 = precision(evaluation)
        of_images = np.array(evaluation.evalImgs, dtype=object).reshape(len(evaluation.params.catIds), -1)
        numbers, drawn = np.random.default_rng(0), []
        for _ in range(RESAMPLES):
            images = numbers.integers(of_images.shape[1], size=of_images.shape[1])
            evaluation.evalImgs = of_images[:, images].ravel().tolist()
            drawn.append(precision(evaluation)[0])
    return dict(ap=ap, ap50=ap50, error=float(np.std(drawn, ddof=1)))


def precision(evaluation: COCOeval) -> tuple[float, float]:
    """AP and AP50 of what was evaluated."""
    evaluation.accumulate()
    found = evaluation.eval["precision"][..., 0, -1]
    return tuple(float(part[part > -1].mean()) for part in (found, found[0]))


def one_run(bench: Bench, row: Row, seed: int, folder: Path, device: str = "cpu") -> dict:
    """Train and judge one row with one seed, in a process of its own.

    Returns:
        AP, its standard error, AP50, parameters and seconds; or 'failed', why.
    """
    torch.set_num_threads(1)
    register_all_modules()
    MMLogger.get_current_instance().setLevel("ERROR")
    if device == "cpu":
        keep_memory()
    begin = time.monotonic()
    try:
        features = {split: Features(folder, split, device) for split in SPLITS}
        channels, sides = features["train"].cells.shape[1], features["train"].sides
        iterations = round(row.length * bench.iterations)
        torch.manual_seed(seed)
        model = Trained(config(bench, row.decoder).model, channels, sides).to(device)
        if row.warm_start:
            plain = Trained(config(bench, {}).model, channels, sides).to(device)
            learn(bench, row, plain, features["train"], iterations // 2, seed)
            start_from_plain_(model, plain.state_dict())
            iterations -= iterations // 2
        for name, parameter in model.named_parameters():
            if ".private." in name and ".A" in name:
                parameter.data *= row.initial_A
        learn(bench, row, model, features["train"], iterations, seed + 1000 * row.warm_start)
        seconds = time.monotonic() - begin
        found = judge(model, features["val"], folder / "digits" / "annotations" / "val.json")
    except Exception as error:  # a row that fails is a result, too
        return dict(failed=f"{type(error).__name__}: {first_line(error)}", seconds=time.monotonic() - begin)
    return found | dict(parameters=model.parameters_of_decoder(), seconds=seconds)
