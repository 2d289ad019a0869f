"""What pictures show: class names of any script, and masks of small images."""

import logging
import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData

from mmdet_lors.visualization.drawing import DetectionVisualizer

PRIVATE = "\U0010fff0\U0010fff1"
"""Letters for private use, which no font of a system has."""


@pytest.fixture
def font(tmp_path):
    """A font that has these letters, as if it had been installed."""
    pen = TTGlyphPen(None)
    for step, corner in enumerate([(0, 0), (0, 900), (900, 900), (900, 0)]):
        (pen.lineTo if step else pen.moveTo)(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(letter): "square" for letter in PRIVATE})
    builder.setupGlyf({".notdef": square, "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable(dict(familyName="Squares", styleName="Regular"))
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "squares.ttf")
    yield
    fontManager.ttflist[:] = before


@pytest.fixture
def lines():
    """What is logged."""
    handler, logged = logging.Handler(), []
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)


def draw(*classes: str, label: int = 0, image: np.ndarray | None = None, **fields) -> np.ndarray:
    """An image with a box of this class."""
    image = np.zeros((400, 400, 3), np.uint8) if image is None else image
    visualizer = DetectionVisualizer()
    visualizer.dataset_meta = dict(classes=classes, palette=[(0, 200, 0)] * len(classes))
    sample = DetDataSample()
    box = torch.tensor([[20.0, 20, 380, 380]])
    sample.pred_instances = InstanceData(
        bboxes=box * image.shape[0] / 400, scores=torch.ones(1), labels=torch.tensor([label]), **fields
    )
    visualizer.add_datasample("", image, sample, draw_gt=False)
    return visualizer.get_image()


def test_a_name_is_drawn_with_a_font_that_has_its_letters(font, lines):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drawn = draw(PRIVATE)
        other = draw("class 0")
    assert not np.array_equal(drawn, other) and not lines
    # Two squares side by side make wide bright runs, which no letter of another font has.
    rows = (drawn[20:60, 20:100].min(axis=2) > 150).sum(axis=1)
    assert rows.max() >= 15


def test_a_name_without_a_font_is_drawn_by_its_number_and_said_once(lines):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drawn = draw("cat", PRIVATE, label=1)
        assert np.array_equal(drawn, draw("cat", "class 1", label=1))
    assert len(lines) == 1 and "1 of 2 class names have letters that no font" in lines[0] and "fonts-noto" in lines[0]


@pytest.mark.parametrize("name", ["Žluťoučký", "кошка", "γάτα", "a\u0301", "x\ty"])
def test_names_that_the_default_font_has_are_drawn_as_they_are(name, lines):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not np.array_equal(draw(name), draw("class 0"))
    assert not lines


def test_a_box_that_ends_at_the_border_is_drawn_without_a_warning():
    visualizer = DetectionVisualizer()
    visualizer.dataset_meta = dict(classes=("a",), palette=[(0, 200, 0)])
    sample = DetDataSample()
    boxes = torch.tensor([[0.0, 0, 500, 400], [-20, 100, 100, 420]])
    sample.pred_instances = InstanceData(bboxes=boxes, scores=torch.ones(2), labels=torch.zeros(2, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        visualizer.add_datasample("", np.zeros((400, 500, 3), np.uint8), sample, draw_gt=False)
    assert visualizer.get_image()[100, 20:90].any()


def test_dollar_signs_begin_no_formula():
    assert not np.array_equal(draw("a$b^{$"), draw("ab^{"))


def test_masks_of_a_small_image_are_enlarged_and_drawn_the_same_each_time():
    masks = torch.zeros(1, 40, 40, dtype=torch.bool)
    masks[0, 10:20, 5:35] = True
    image = np.zeros((40, 40, 3), np.uint8)
    first, second = (draw("a", image=image, masks=masks) for _ in range(2))
    assert first.shape == (400, 400, 3) and np.array_equal(first, second)
    assert first[150, 200].any() and not first[250, 200].any()
