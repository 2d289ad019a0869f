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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Raised with every change of a pixel or an annotation, so that no old data set is taken for a new one.
GENERATOR_VERSION = "1.0"

SPLITS = ("train", "val")
ENTRIES = {"annotations", *SPLITS}
MIN_SIZE, MAX_SIZE = 32, 1024
CLASSES = tuple("0123456789")

EMPTY_SHARE = 0.08
TOUCHING_SHARE = 0.15
SMALL_SHARE = 0.1
MAX_DIGITS = 5
MAX_IOU = 0.3
PLACEMENT_TRIES = 40
MIN_VISIBLE_ALPHA = 0.2
MIN_CONTRAST = 120.0


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


@dataclass(frozen=True)
class Source:
    """The real images a split may use.

    regions: photo halves, each uint8 (H, W, 3). digits: (N, 8, 8) ink from 0 to 16. labels: (N,) 0 to 9.
    pool: (M,) rows of ``digits`` that belong to the split.
    """

    regions: list[np.ndarray]
    digits: np.ndarray
    labels: np.ndarray
    pool: np.ndarray


@dataclass(frozen=True)
class Box:
    """Half-open pixel rectangle [x0, x1) x [y0, y1)."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def area(self) -> int:
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    @property
    def window(self) -> tuple[slice, slice]:
        """Index of the rectangle's pixels in an (H, W, ...) array."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def iou(self, other: Box) -> float:
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        shared = max(width, 0) * max(height, 0)
        return shared / (self.area + other.area - shared)

    def touches(self, other: Box) -> bool:
        """Whether the rectangles overlap or are at most one pixel apart."""
        gap_x = max(self.x0, other.x0) - min(self.x1, other.x1)
        gap_y = max(self.y0, other.y0) - min(self.y1, other.y1)
        return max(gap_x, gap_y) <= 1


@dataclass(frozen=True)
class Paste:
    """One pasted digit: its row in ``load_digits()``, its class 0 to 9 and the tight box of its ink."""

    digit_index: int
    label: int
    box: Box


@dataclass(frozen=True)
class Scene:
    """An image with its digits; image and background (the same before pasting) are uint8 (size, size, 3)."""

    image: np.ndarray
    background: np.ndarray
    pastes: list[Paste]


def split_digits(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Split the rows of ``labels`` (N,) into disjoint train (80 %) and val (20 %) rows, class by class."""
    rng = np.random.default_rng([seed, len(SPLITS)])
    train, val = [], []
    for label in range(len(CLASSES)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cut = round(0.8 * len(rows))
        train.append(rows[:cut])
        val.append(rows[cut:])
    return {"train": np.sort(np.concatenate(train)), "val": np.sort(np.concatenate(val))}


def load_sources(seed: int) -> dict[str, Source]:
    """Load scikit-learn's digits and photos and divide both between the splits."""
    # Imported late: it takes a second, which --help and a mistyped option should not cost.
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    photos = load_sample_images().images
    pools = split_digits(digits.target, seed)
    halves = {
        "train": [photo[:, : photo.shape[1] // 2] for photo in photos],
        "val": [photo[:, photo.shape[1] // 2 :] for photo in photos],
    }
    return {split: Source(halves[split], digits.images, digits.target, pools[split]) for split in SPLITS}


def draw_background(regions: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Crop a random square of a random region, perhaps mirror it, resize to uint8 (size, size, 3)."""
    region = regions[rng.integers(len(regions))]
    height, width = region.shape[:2]
    longest = min(height, width)
    side = int(rng.integers(min(size, longest), longest + 1))
    x0 = int(rng.integers(width - side + 1))
    y0 = int(rng.integers(height - side + 1))
    crop = Image.fromarray(np.ascontiguousarray(region[y0 : y0 + side, x0 : x0 + side]))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))


def render_digit(digit: np.ndarray, height: float, aspect: float, angle: float) -> np.ndarray:
    """Enlarge an 8x8 digit (ink 0 to 16) to an opacity mask (h, w) in [0, 1], trimmed to its visible ink.

    height: pixels the eight rows become; aspect: extra width factor; angle: degrees, counter-clockwise.
    Every opacity is 0 or at least ``MIN_VISIBLE_ALPHA``, so that the mask's extent is what an eye sees.
    """
    padded = np.pad(digit / 16.0, 1).astype(np.float32)
    cell = height / digit.shape[0]
    mask = Image.fromarray(padded).resize(
        (round(padded.shape[1] * cell * aspect), round(padded.shape[0] * cell)), Image.Resampling.BICUBIC
    )
    ink = np.asarray(mask.rotate(angle, Image.Resampling.BICUBIC, expand=True))
    # Enlarging blurs 8 pixels over the whole digit: a steeper edge brings back a pen's stroke.
    alpha = np.clip((ink - 0.35) / 0.4, 0.0, 1.0)
    alpha[alpha < MIN_VISIBLE_ALPHA] = 0.0
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def random_mask(digit: np.ndarray, height: float, rng: np.random.Generator) -> np.ndarray:
    """Render a digit with a random aspect ratio (0.8 to 1.25) and a slight rotation."""
    aspect = float(np.exp(rng.uniform(np.log(0.8), np.log(1.25))))
    return render_digit(digit, height, aspect, float(rng.uniform(-10.0, 10.0)))


def random_height(size: int, rng: np.random.Generator) -> float:
    """Digit height in pixels, log-uniform from a fifth to half of the image: 19 to 48 at 96 pixels.

    One digit in ten is smaller, down to an eighth.
    """
    low, high = (size / 8, size / 5) if rng.random() < SMALL_SHARE else (size / 5, size / 2)
    low = max(low, 8.0)
    return float(np.exp(rng.uniform(np.log(low), np.log(max(low, high)))))


def contrast(patch: np.ndarray, colour: np.ndarray) -> float:
    """RGB distance between a colour (3,) and the patch (h, w, 3) that nine tenths of its pixels exceed."""
    return float(np.percentile(np.linalg.norm(patch - colour, axis=-1), 10))


def pick_colour(patch: np.ndarray, wanted: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """An ink colour (3,) in [0, 255] that can be read on a patch (h, w, 3), ``wanted`` if that can be."""
    tried = list(rng.uniform(0, 255, (20, 3)).astype(np.float32))
    if wanted is not None:
        tried.insert(0, wanted)
    readable = (colour for colour in tried if contrast(patch, colour) >= MIN_CONTRAST)
    return next(readable, max(tried, key=lambda colour: contrast(patch, colour)))


def free_positions(shape: tuple[int, int], size: int, rng: np.random.Generator) -> Iterator[Box]:
    """Random boxes of a mask's (h, w) within the image."""
    height, width = shape
    if max(shape) > size:
        return
    for _ in range(PLACEMENT_TRIES):
        x0, y0 = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        yield Box(x0, y0, x0 + width, y0 + height)


def neighbour_positions(shape: tuple[int, int], other: Box, size: int, rng: np.random.Generator) -> Iterator[Box]:
    """Boxes of a mask's (h, w) within the image beside ``other``: one pixel of overlap to one of gap."""
    height, width = shape
    lift = int(rng.integers(-(height // 8), height // 8 + 1))
    y0 = (other.y0 + other.y1 - height) // 2 + lift
    gaps = rng.permutation([-1, 0, 1])
    for to_the_right in rng.permutation([True, False]):
        for gap in gaps:
            x0 = other.x1 + int(gap) if to_the_right else other.x0 - int(gap) - width
            if x0 >= 0 and y0 >= 0 and x0 + width <= size and y0 + height <= size:
                yield Box(x0, y0, x0 + width, y0 + height)


def first_fitting(mask: np.ndarray, boxes: Iterable[Box], inked: np.ndarray, placed: list[Paste]) -> Box | None:
    """The first box in which the mask covers no earlier ink (bool (size, size)) and overlaps no box too much.

    As ink never covers ink, every box stays tight around what is visible of its digit.
    """
    for box in boxes:
        crowded = any(box.iou(paste.box) >= MAX_IOU for paste in placed)
        if not crowded and not (inked[box.window] & (mask > 0)).any():
            return box
    return None


def compose_scene(source: Source, size: int, rng: np.random.Generator) -> Scene:
    """Draw a background and paste no digit (8 % of images) or one to five, some pairs side by side."""
    background = draw_background(source.regions, size, rng)
    canvas = background.astype(np.float32)
    inked = np.zeros((size, size), dtype=bool)
    pastes: list[Paste] = []

    def paste(height: float, beside: Box | None = None, wanted: np.ndarray | None = None) -> np.ndarray | None:
        """Paste a random digit at random or beside a box; return its colour, None if nothing fits."""
        index = int(rng.choice(source.pool))
        mask = random_mask(source.digits[index], height, rng)
        if beside is None:
            boxes = free_positions(mask.shape, size, rng)
        else:
            boxes = neighbour_positions(mask.shape, beside, size, rng)
        box = first_fitting(mask, boxes, inked, pastes)
        if box is None:
            return None
        colour = pick_colour(canvas[box.window], wanted, rng)
        opacity = mask[..., None] * rng.uniform(0.85, 1.0)
        canvas[box.window] += opacity * (colour - canvas[box.window])
        inked[box.window] |= mask > 0
        pastes.append(Paste(index, int(source.labels[index]), box))
        return colour

    kind = rng.random()
    if kind >= EMPTY_SHARE:
        count = int(rng.integers(1, MAX_DIGITS + 1))
        if kind >= 1.0 - TOUCHING_SHARE:
            # Same height and colour: digits of one number, which only their shapes tell apart.
            height = random_height(size, rng)
            colour = paste(height)
            for _ in range(PLACEMENT_TRIES):
                if paste(height, beside=pastes[0].box, wanted=colour) is not None:
                    break
        for _ in range(count - len(pastes)):
            paste(random_height(size, rng))
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(image, background, pastes)


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one image, independent of every other image."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


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
    columns = (
        TextColumn("{task.description:5}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        (folder / "annotations").mkdir()
        for split in SPLITS:
            (folder / split).mkdir()
            coco = empty_coco(options, split)
            for index in bar.track(range(options.count(split)), description=split):
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
    defaults = Options()
    parser = OneLineParser(
        prog="digits_to_coco.py",
        description="Write a COCO-format data set of scikit-learn's real handwritten digits, pasted on its "
        "two real photos: OUT/annotations/{train,val}.json, OUT/train/*.png, OUT/val/*.png. Nothing is "
        "downloaded. Train and val share neither digit samples nor photo halves.",
        epilog="The same options give the same bytes. If OUT holds exactly this data set, nothing is done. "
        "OUT changes only when the whole data set has been written.",
    )
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--train-images",
        type=int,
        default=defaults.train_images,
        metavar="N",
        help="number of training images (default: %(default)s)",
    )
    parser.add_argument(
        "--val-images",
        type=int,
        default=defaults.val_images,
        metavar="N",
        help="number of validation images (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=defaults.size,
        metavar="PX",
        help=f"side of the square images, {MIN_SIZE} to {MAX_SIZE}; digits scale too (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help="0 or more; another seed, another data set (default: %(default)s)",
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
