"""Draws boxes on images: enlarges small images, draws class names of any script, and makes one drawing at a time."""

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import mmcv
import numpy as np
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from mmdet.registry import VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import scale_boxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.dist import master_only
from mmengine.logging import print_log

MIN_SIDE = 400
"""Longer side, in pixels, below which an image is enlarged; otherwise labels would cover it."""
DRAWING = RLock()
"""Held while something is drawn: neither matplotlib nor a visualizer's figure is safe to use in several threads."""


def enlarged(image: np.ndarray, sample: DetDataSample, min_side: int = MIN_SIDE) -> tuple[np.ndarray, DetDataSample]:
    """A small image (H, W, 3), its boxes and masks, enlarged by a whole factor; a larger one is returned unchanged."""
    factor = -(-min_side // max(image.shape[:2]))
    if factor == 1 or {"pred_sem_seg", "pred_panoptic_seg", "gt_sem_seg", "gt_panoptic_seg"} & set(sample.keys()):
        return image, sample
    sample = sample.clone()
    size = (image.shape[0] * factor, image.shape[1] * factor)
    for instances in (sample.get("gt_instances"), sample.get("pred_instances")):
        if instances is None:
            continue
        if "masks" in instances:
            # Set as a whole, like the boxes: mmengine wants all fields of equal length.
            instances.masks = _enlarged_masks(instances.masks, factor, size)
        if "bboxes" in instances:
            instances.bboxes = scale_boxes(instances.bboxes, (factor, factor))
    return mmcv.imrescale(image, factor), sample


def _enlarged_masks(masks: Any, factor: int, size: tuple[int, int]) -> Any:
    if isinstance(masks, BitmapMasks | PolygonMasks):
        return masks.resize(size)
    return masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)  # (k, h, w)


@VISUALIZERS.register_module()
class DetectionVisualizer(DetLocalVisualizer):
    """mmdet's visualizer, which enlarges small images and draws class names with fonts that have their letters.

    A class whose name no font of the machine can draw is shown by its number, and the log says so. Threads take turns.

    Args:
        min_side: longer side, in pixels, below which an image is enlarged.
        **fields: those of mmdet's ``DetLocalVisualizer``.
    """

    def __init__(self, name: str = "visualizer", *args: Any, min_side: int = MIN_SIDE, **fields: Any) -> None:
        super().__init__(name, *args, **fields)
        self.min_side = min_side

    @master_only
    def add_datasample(
        self, name: str, image: np.ndarray, data_sample: DetDataSample | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """As in mmdet."""
        if data_sample is not None:
            image, data_sample = enlarged(image, data_sample.cpu(), self.min_side)
        with DRAWING, _same_colours():
            self._make_names_drawable()
            super().add_datasample(name, image, data_sample, *args, **kwargs)

    def draw_texts(self, texts: str | list[str], *args: Any, **kwargs: Any) -> "DetectionVisualizer":
        """As in mmengine, but a dollar sign is drawn as such and does not begin a formula."""
        listed = [texts] if isinstance(texts, str) else texts
        if self._families:
            kwargs["font_families"] = [self._families] * len(listed)
        return super().draw_texts([text.replace("$", r"\$") for text in listed], *args, **kwargs)

    def _is_posion_valid(self, position: np.ndarray) -> bool:
        """Boxes end at the border, and are drawn up to it: mmengine would print a warning of them."""
        return True

    _families: list[str] | None = None
    _drawable: Sequence[str] | None = None

    def _make_names_drawable(self) -> None:
        classes = self.dataset_meta.get("classes")
        if classes is not None and classes is not self._drawable:
            self._drawable, self._families = drawable(classes)
            self.dataset_meta = {**self.dataset_meta, "classes": self._drawable}


@contextmanager
def _same_colours() -> Iterator[None]:
    """Give each drawing of an image the same colours: mmdet varies those of masks at random."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def drawable(names: Sequence[str]) -> tuple[tuple[str, ...], list[str] | None]:
    """Names that can be drawn, and the font families they need, in order; None if the default one is enough.

    A name with a letter that no font has becomes ``class N``, N being its place; one line in the log says so.
    """
    names = [" ".join(name.split()) for name in names]
    fonts = ["sans-serif"]
    missing = {letter for name in names for letter in name} - _letters(findfont(FontProperties(family=fonts)))
    if not missing:
        return tuple(names), None
    for family, letters in _families():
        if letters & missing:
            fonts.append(family)
            missing -= letters
        if not missing:
            break
    # Characters that only join or style their neighbours can be left out.
    joiners = {letter for letter in missing if unicodedata.category(letter) == "Cf" or letter == "\ufe0f"}
    names = ["".join(letter for letter in name if letter not in joiners) for name in names]
    bad = [place for place, name in enumerate(names) if missing & set(name)]
    if bad:
        some = ", ".join(repr(names[place]) for place in bad[:3]) + (", ..." if len(bad) > 3 else "")
        print_log(
            f"{len(bad)} of {len(names)} class names have letters that no font of this machine can draw, so pictures "
            f"show their numbers ({some} as 'class {bad[0]}'{', ...' if len(bad) > 1 else ''}); install a font that "
            "has them, such as Debian's fonts-noto-cjk or fonts-noto-core",
            logger="current",
            level=logging.WARNING,
        )
    return tuple(f"class {place}" if place in set(bad) else name for place, name in enumerate(names)), (
        fonts if len(fonts) > 1 else None
    )


def _families() -> Iterator[tuple[str, set[str]]]:
    """Font families of this machine, upright and of normal weight first, with the letters that they have."""
    known = {font.fname for font in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:  # installed after matplotlib made its list
            try:
                fontManager.addfont(path)
            except (OSError, RuntimeError):
                continue
    for font in sorted(fontManager.ttflist, key=lambda f: (f.style != "normal", abs(_weight(f.weight) - 400), f.name)):
        if "lastresort" not in font.name.replace(" ", "").lower():  # it draws every letter as a box
            yield font.name, _letters(font.fname)


def _weight(weight: int | str) -> int:
    return weight if isinstance(weight, int) else 400


def _letters(path: str) -> set[str]:
    """The letters that matplotlib can draw with this font file."""
    try:
        font = FT2Font(path)
        return set(map(chr, font.get_charmap())) if font.scalable else set()
    except (OSError, RuntimeError):
        return set()
