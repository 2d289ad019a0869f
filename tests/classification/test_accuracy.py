"""Accuracy against values counted by hand."""

import pytest
import torch
from mmdet.registry import METRICS

from mmdet_lors.classification import Accuracy
from mmdet_lors.errors import UserError


def test_top1_and_top3_by_hand():
    metric = METRICS.build(dict(type="Accuracy", topk=(1, 3)))
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1])
    metric.process({}, [dict(scores=scores, label=label) for label in (0, 1)])
    metric.process({}, [dict(scores=scores, label=label) for label in (3, 2)])
    assert metric.evaluate(4) == {"accuracy/top1": 25.0, "accuracy/top3": 75.0}


def test_refuses_more_than_there_are_classes():
    metric = Accuracy(topk=(1, 5))
    with pytest.raises(UserError, match="Accuracy.topk has 5, but the data set has 3 classes"):
        metric.dataset_meta = dict(classes=("a", "b", "c"))
    with pytest.raises(UserError, match="topk must hold numbers of 1 or more"):
        Accuracy(topk=(0,))
