"""Top-k accuracy."""

from collections.abc import Sequence

from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric

from mmdet_lors.errors import UserError


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Per cent of images whose true class is among the k with the highest scores, for each k.

    Args:
        topk: the values of k.
        collect_device: where the processes' results are collected, 'cpu' or 'gpu'.
        prefix: put before the names: 'accuracy/top1'.

    Raises:
        UserError: a k below 1, or, once the data set is known, above its number of classes.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5), collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not topk or min(topk) < 1:
            raise UserError(f"Accuracy.topk must hold numbers of 1 or more, got {topk}")
        self.topk = tuple(topk)

    @BaseMetric.dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        """The data set's ``metainfo``, of which ``classes`` is read."""
        classes = len(dataset_meta["classes"])
        if max(self.topk) > classes:
            raise UserError(f"Accuracy.topk has {max(self.topk)}, but the data set has {classes} classes")
        self._dataset_meta = dataset_meta

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Record for each image whether it was right for each k."""
        for sample in data_samples:
            ranked = sample["scores"].topk(max(self.topk)).indices.tolist()
            self.results.append([sample["label"] in ranked[:k] for k in self.topk])

    def compute_metrics(self, results: list[list[bool]]) -> dict[str, float]:
        """'top1', 'top5', ... in per cent."""
        right = zip(*results, strict=True)
        return {f"top{k}": 100 * sum(hits) / len(results) for k, hits in zip(self.topk, right, strict=True)}
