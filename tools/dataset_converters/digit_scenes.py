"""Images of digits_to_coco.py: scikit-learn's handwritten digits pasted onto its photos, with a tight box each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

SPLITS = ("train", "val")
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
