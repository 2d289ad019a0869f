"""Write a small COCO-format detection data set made of real images that scikit-learn carries.

Real handwritten digits (``load_digits``, 10 classes) are pasted in varied size, colour and position onto
crops of two real photos (``load_sample_images``). Nothing is downloaded. Train and val share the ten classes
only: the digit samples are split 80/20 per class, and train crops come from the left half of each photo (a
pagoda, a flower), val crops from the right half (a lake with trees, the flower's edge). Image ``i`` of a
split depends on the seed, the size and ``i`` alone, never on how many images there are.

    python tools/dataset_converters/digits_to_coco.py --out data/digits --train-images 2000 --val-images 300

Layout: ``annotations/train.json``, ``annotations/val.json``, ``train/000001.png`` ..., ``val/000001.png`` ...
Beyond the COCO fields each annotation carries ``digit_index``, the row of ``load_digits()`` that was pasted.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import signal
import sys
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import NoReturn

from digit_scenes import CLASSES, SPLITS, Box, Scene, compose_scene, load_sources, scene_rng
from PIL import Image
from rich.console import Console
from rich.progress import track

# Raised with every change of a pixel or an annotation, so that no old data set is taken for a new one.
GENERATOR_VERSION = "1.0"

ENTRIES = {"annotations", *SPLITS}
MIN_SIZE, MAX_SIZE = 32, 1024


@dataclass(frozen=True)
class Options:
    """What a data set depends on besides the generator's version; raises ValueError naming the bad field."""

    train_images: int = 2000
    val_images: int = 300
    size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for split in SPLITS:
            if self.count(split) < 1:
                raise ValueError(f"{split}-images is {self.count(split)}, must be at least 1")
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size is {self.size}, must be {MIN_SIZE} to {MAX_SIZE} pixels")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, must be 0 or more")

    def count(self, split: str) -> int:
        """Number of images of a split."""
        return self.train_images if split == "train" else self.val_images


def describe(options: Options, split: str) -> dict:
    """The ``info`` of an annotation file; equal where the data sets are equal."""
    return {
        "description": "Handwritten digits pasted on photos, from the images that scikit-learn carries",
        "generator": "digits_to_coco",
        "version": GENERATOR_VERSION,
        "split": split,
        "options": asdict(options),
    }


def empty_coco(options: Options, split: str) -> dict:
    """A COCO data set without images."""
    return {
        "info": describe(options, split),
        "licenses": [{"id": 1, "name": "Attribution License", "url": "https://creativecommons.org/licenses/by/2.0/"}],
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES)],
    }


def add_scene(coco: dict, file_name: str, scene: Scene) -> None:
    """Append an image and its digits; boxes are [x, y, width, height] in pixels."""
    height, width = scene.image.shape[:2]
    image_id = len(coco["images"]) + 1
    coco["images"].append({"id": image_id, "file_name": file_name, "width": width, "height": height, "license": 1})
    for paste in scene.pastes:
        box = paste.box
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": paste.label + 1,
                "bbox": [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0],
                "area": box.area,
                "iscrowd": 0,
                "segmentation": [],
                "digit_index": paste.digit_index,
            }
        )


def write_dataset(folder: Path, options: Options, progress: bool) -> None:
    """Write both splits into an existing empty folder, with a progress bar on stderr if asked for."""
    sources = load_sources(options.seed)
    (folder / "annotations").mkdir()
    for split in SPLITS:
        (folder / split).mkdir()
        coco = empty_coco(options, split)
        indices = range(options.count(split))
        for index in track(indices, f"{split:5}", console=Console(stderr=True), disable=not progress):
            scene = compose_scene(sources[split], options.size, scene_rng(options.seed, split, index))
            file_name = f"{index + 1:06d}.png"
            Image.fromarray(scene.image).save(folder / split / file_name, compress_level=3)
            add_scene(coco, file_name, scene)
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(coco) + "\n", encoding="utf-8")


def read_annotations(folder: Path, split: str) -> dict:
    """The COCO data set of a split."""
    return json.loads((folder / "annotations" / f"{split}.json").read_text(encoding="utf-8"))


def holds(folder: Path, options: Options) -> bool:
    """Whether a folder holds exactly this data set: same options and version, all images there."""
    try:
        for split in SPLITS:
            coco = read_annotations(folder, split)
            named = {image["file_name"] for image in coco["images"]}
            there = {path.name for path in (folder / split).iterdir()}
            if coco["info"] != describe(options, split) or named != there:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def check_replaceable(out: Path, force: bool) -> None:
    """Raise FileExistsError unless ``out`` is absent, empty, or (``force``) a data set and nothing else."""
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file, must be a folder")
    if not out.exists():
        return
    found = {path.name for path in out.iterdir()}
    # Even --force must not empty a home folder because of a slip in --out.
    foreign = sorted(found - ENTRIES)
    if foreign:
        raise FileExistsError(f"{out} holds other things ({foreign[0]}), choose another folder")
    if found and not force:
        raise FileExistsError(f"{out} holds another data set, use --force to replace it")


def swap_in(new: Path, out: Path) -> None:
    """Move the folder ``new`` to ``out``; what was there is put back if that fails, removed if not."""
    old = new.with_suffix(".old")
    replaced = out.exists()
    if replaced:
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if replaced:
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def build(
    out: Path,
    train_images: int = 2000,
    val_images: int = 300,
    size: int = 96,
    seed: int = 0,
    force: bool = False,
    progress: bool = False,
) -> bool:
    """Write the data set to the folder ``out``, as a whole or not at all.

    Args:
        out: folder to create; its parents are created too.
        train_images, val_images: number of images, at least 1.
        size: side of the square images in pixels, 32 to 1024.
        seed: 0 or more; equal seeds give equal bytes.
        force: replace another data set of this layout that ``out`` holds.
        progress: show a progress bar on stderr.

    Returns:
        True if it was written, False if ``out`` held exactly this data set already.

    Raises:
        ValueError: an option is out of range.
        FileExistsError: ``out`` is a file, or a folder that holds something else.
        OSError: it cannot be written.
    """
    options = Options(train_images, val_images, size, seed)
    out = Path(out).resolve()
    if holds(out, options):
        return False
    check_replaceable(out, force)
    new_parents = [parent for parent in out.parents if not parent.exists()]
    staging = out.parent / f".{out.name}-{secrets.token_hex(4)}.new"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        write_dataset(staging, options, progress)
        swap_in(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    return True


def summarise(coco: dict) -> dict[str, float]:
    """Count images, digits and touching pairs; shares of empty images and of small digits, from 0 to 1.

    A digit is small when its box is smaller than a square of a sixth of the image's side (COCO's limit of
    32x32 pixels would call most digits of a 96 pixel image small). A pair touches when its boxes are at most
    one pixel apart.
    """
    boxes: dict[int, list[Box]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        boxes[annotation["image_id"]].append(Box(x, y, x + width, y + height))
    side = coco["images"][0]["width"]
    digits = [box for group in boxes.values() for box in group]
    return {
        "images": len(boxes),
        "digits": len(digits),
        "empty_share": sum(not group for group in boxes.values()) / len(boxes),
        "small_share": sum(box.area < (side / 6) ** 2 for box in digits) / max(len(digits), 1),
        "touching_pairs": sum(a.touches(b) for group in boxes.values() for a, b in combinations(group, 2)),
    }


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like this tool's other errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        prog="digits_to_coco.py",
        description="Write a COCO-format data set of scikit-learn's real handwritten digits, pasted on its "
        "two real photos: OUT/annotations/{train,val}.json, OUT/train/*.png, OUT/val/*.png. Nothing is "
        "downloaded. Train and val share neither digit samples nor photo halves.",
        epilog="The same options give the same bytes. If OUT holds exactly this data set, nothing is done. "
        "OUT changes only when the whole data set has been written.",
    )
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="folder to write (default: %(default)s)")
    for name, metavar, meaning in (
        ("train_images", "N", "number of training images"),
        ("val_images", "N", "number of validation images"),
        ("size", "PX", f"side of the square images, {MIN_SIZE} to {MAX_SIZE}; digits scale too"),
        ("seed", "SEED", "0 or more; another seed, another data set"),
    ):
        option = f"--{name.replace('_', '-')}"
        default = getattr(Options, name)
        parser.add_argument(
            option, type=int, default=default, metavar=metavar, help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument("--force", action="store_true", help="replace another data set that OUT holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return the exit code: 0 done, 1 cannot write, 2 bad option, 130 interrupted."""
    args = parse_args(argv)

    def fail(code: int, message: object) -> int:
        print(f"digits_to_coco.py: error: {message}", file=sys.stderr)
        return code

    try:
        written = build(**vars(args), progress=sys.stderr.isatty())
    except ValueError as error:
        return fail(2, error)
    except ModuleNotFoundError as error:
        return fail(1, f"{error.name} is not installed, install scikit-learn")
    except FileExistsError as error:
        return fail(1, error)
    except OSError as error:
        return fail(1, f"cannot write {args.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail(130, f"interrupted, {args.out} is unchanged")

    print(f"{args.out}: " + ("written" if written else "holds exactly this data set already, nothing done"))
    for split in SPLITS:
        counts = summarise(read_annotations(args.out, split))
        print(
            f"{split:5} {counts['images']} images ({counts['empty_share']:.1%} empty), "
            f"{counts['digits']} digits ({counts['small_share']:.1%} small), "
            f"{counts['touching_pairs']} touching pairs"
        )
    return 0


if __name__ == "__main__":
    # A stopped job, too, should take its half-written folder along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
