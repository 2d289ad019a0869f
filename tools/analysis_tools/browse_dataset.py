"""Show what a model is trained on: the images of a config's data set after its pipeline, with their labels.

mmdet's visualizer draws detection data (boxes and masks after augmentation); classification data have their class as
title. Random augmentations follow --seed. --out is a folder, for one picture per image, or one file, for a contact
sheet of all images.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train", help="default: %(default)s")
    parser.add_argument("--number", type=int, default=8, metavar="N", help="how many images (default: %(default)s)")
    parser.add_argument(
        "--start", type=int, default=0, metavar="I", help="index of the first image (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the augmentations (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder for pictures, or a contact sheet: .png, .pdf, .svg or .jpg",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import mmcv
import numpy as np
from matplotlib.figure import Figure
from mmdet.registry import DATASETS, VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes
from mmengine.config import Config
from mmengine.runner import set_random_seed
from mmengine.visualization import Visualizer

from mmdet_lors.analysis.arguments import PICTURES, check_writable
from mmdet_lors.analysis.output import console, save_figure
from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError

COLUMNS = 4
MIN_SIDE = 180
"""Smaller images are enlarged to at least this many pixels, about their size on a contact sheet."""


class Picture(NamedTuple):
    """One image of the data set, drawn."""

    name: str
    """File name without ending."""
    title: str
    image: np.ndarray
    """(H, W, 3), RGB."""
    num_labels: int
    """Boxes, or 1 class."""


def build_dataset(cfg: Config, split: str):
    """Check the files of a split's data set, and build it.

    Raises:
        UserError: the config has no such split, or data is missing or does not fit.
    """
    loader = cfg.get(f"{split}_dataloader")
    if not loader:
        raise UserError(f"config {cfg.filename} has no {split}_dataloader")
    # Without the model: its weights are not needed here.
    check_inputs(Config({"model": {}, f"{split}_dataloader": loader.to_dict()}), (split,))
    return DATASETS.build(loader.dataset)


def _pixels(inputs) -> np.ndarray:
    """(C, H, W) uint8 -> (H, W, 3); grey becomes three equal channels."""
    image = inputs.permute(1, 2, 0).numpy()
    return np.ascontiguousarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image)


def _detection(visualizer: Visualizer, item: dict, index: int) -> Picture:
    sample: DetDataSample = item["data_samples"].clone()
    if isinstance(sample.gt_instances.bboxes, BaseBoxes):
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor
    image = _pixels(item["inputs"])[..., ::-1]  # PackDetInputs leaves BGR.
    size = f"{image.shape[1]} x {image.shape[0]}"
    count = len(sample.gt_instances)
    visualizer.add_datasample("", np.ascontiguousarray(image), sample, draw_pred=False)
    name = Path(sample.img_path).stem
    return Picture(f"{index:06d}_{name}", f"{name}: {size}, {count} boxes", visualizer.get_image(), count)


def _classification(classes: tuple[str, ...], item: dict, index: int) -> Picture:
    image, label = _pixels(item["inputs"]), item["data_samples"]
    return Picture(f"{index:06d}_{classes[label]}", f"{index}: {classes[label]!r}", image, 1)


def pictures(cfg: Config, dataset, start: int, number: int, seed: int) -> Iterator[Picture]:
    """Draw ``number`` images from ``start`` on.

    Raises:
        UserError: a start beyond the data set, or a pipeline whose output is neither detection's nor classification's.
    """
    if not 0 <= start < len(dataset):
        raise UserError(f"--start {start}: the data set has images 0 to {len(dataset) - 1}")
    set_random_seed(seed)
    visualizer = None
    for index in range(start, min(start + number, len(dataset))):
        item = dataset[index]
        sample = item.get("data_samples") if isinstance(item, dict) else None
        if isinstance(sample, DetDataSample):
            if visualizer is None:
                # Not the config's back ends: they would write logs.
                own = dict(type="DetectionVisualizer", min_side=MIN_SIDE, vis_backends=None, name="browse_dataset")
                visualizer = VISUALIZERS.build(dict(cfg.visualizer, **own))
                visualizer.dataset_meta = dataset.metainfo
            yield _detection(visualizer, item, index)
        elif isinstance(sample, int):
            yield _classification(dataset.metainfo["classes"], item, index)
        else:
            raise UserError(
                f"the pipeline of {cfg.filename} returns a {type(sample).__name__} as data_samples, "
                "neither a DetDataSample nor a class"
            )


def contact_sheet(found: list[Picture]) -> Figure:
    """All pictures on one page, each under its title."""
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    ratio = max(picture.image.shape[0] / picture.image.shape[1] for picture in found)
    figure = Figure(figsize=(2.7 * columns, (2.7 * min(ratio, 1.6) + 0.3) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, picture in zip(axes, found, strict=False):
        ax.imshow(picture.image)
        ax.set_title(picture.title, fontsize=8)
    return figure


def main() -> None:
    """Check the data, then draw."""
    args = parse_args()
    if args.number < 1:
        raise UserError(f"--number {args.number}: must be 1 or more")
    sheet = args.out.suffix in PICTURES
    if sheet:
        check_writable("--out", args.out)
    elif args.out.is_file():
        raise UserError(f"--out {args.out}: is a file of another kind; give a folder, or one of {', '.join(PICTURES)}")
    cfg = load_config(args.config, needs_model=False)
    dataset = build_dataset(cfg, args.split)
    found = []
    for picture in pictures(cfg, dataset, args.start, args.number, args.seed):
        if sheet:
            found.append(picture)
        else:
            mmcv.imwrite(picture.image[..., ::-1], str(args.out / f"{picture.name}.png"))
    if sheet:
        save_figure(contact_sheet(found), args.out)
    out = console()
    out.print(f"{args.split} of {args.config}: {len(dataset):,} images")
    out.print(f"wrote {args.out}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
