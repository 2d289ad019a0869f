"""The detector as a function from a tensor to tensors, which is what exporters trace and servers call."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmdet_lors.errors import UserError

OUTPUTS = ["boxes", "scores", "labels"]
"""Names of what an exported file puts out, in the order of :meth:`TensorDetector.forward`."""


def check_installed(*packages: str) -> None:
    """Refuse to begin without packages of the extra "export".

    Raises:
        UserError: names those that are missing.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"missing: {', '.join(missing)}; install what exporting needs: pip install mmdet_lors[export]")


@contextmanager
def any_batch() -> Iterator[None]:
    """While it lasts, mmdet's Swin can be traced for any batch: its own code turns the batch into a constant."""

    def window_reverse(self: ShiftWindowMSA, windows: Tensor, H: int, W: int) -> Tensor:
        """Windows (B * H / s * W / s, s, s, C) -> maps (B, H, W, C), for s = ``window_size``."""
        rows, columns = H // self.window_size, W // self.window_size
        return windows.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    before, ShiftWindowMSA.window_reverse = ShiftWindowMSA.window_reverse, window_reverse
    try:
        yield
    finally:
        ShiftWindowMSA.window_reverse = before


class TensorDetector(nn.Module):
    """Images in, detections out; what mmdet does around the network is inside.

    Every image counts as full, so that a batch needs no data samples.

    Args:
        detector: the network.
        data_preprocessor: the model config's field of that name. mmdet reads images as BGR: where this field changes
            their channel order, the network sees RGB, else BGR.
    """

    def __init__(self, detector: nn.Module, data_preprocessor: dict) -> None:
        super().__init__()
        self.detector = detector
        self.sees_bgr = not (data_preprocessor.get("bgr_to_rgb") or data_preprocessor.get("rgb_to_bgr"))
        for name, neutral in (("mean", 0.0), ("std", 1.0)):
            values = data_preprocessor.get(name) or [neutral] * 3
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detections as the detector itself makes them, best first.

        Args:
            images: (B, 3, H, W), RGB, 0 to 255.

        Returns:
            With k = min(max_per_img, N * num_classes): boxes (x1, y1, x2, y2) in input pixels (B, k, 4), scores (B, k)
            and labels (B, k).
        """
        if self.sees_bgr:
            images = images.flip(1)
        return self.detect((images - self.mean) / self.std)

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of normalised images."""
        # The start is the same for all images; a list of B sizes would fix the batch while an export traces.
        start = self.detector.query_generator([images.shape[-2:]])
        xyzr, content = (x.expand(images.shape[0], -1, -1) for x in start)
        return self.detector.decoder.detect(self.detector.extract_feat(images), xyzr, content)

    @property
    def max_per_img(self) -> int:
        """k."""
        return self.detector.decoder.max_per_img

    @max_per_img.setter
    def max_per_img(self, number: int) -> None:
        self.detector.decoder.max_per_img = number

    @property
    def pairs(self) -> int:
        """N * num_classes."""
        return self.detector.query_generator.num_queries * self.detector.decoder.num_classes


class TensorDETR(TensorDetector):
    """The same of mmdet's detectors of the DETR family: their code fixes batch and size while an export traces."""

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = (int(side) for side in images.shape[-2:])
        shape = dict(batch_input_shape=(height, width), img_shape=(height, width))
        samples = self.detector.predict(images, [DetDataSample(metainfo=shape) for _ in images], rescale=False)
        found = [[getattr(s.pred_instances, name) for s in samples] for name in ("bboxes", "scores", "labels")]
        boxes, scores, labels = map(torch.stack, found)
        return boxes, scores, labels

    @property
    def max_per_img(self) -> int:
        return (self.detector.bbox_head.test_cfg or {}).get("max_per_img", self.detector.num_queries)

    @max_per_img.setter
    def max_per_img(self, number: int) -> None:
        head = self.detector.bbox_head
        head.test_cfg = dict(head.test_cfg or {}, max_per_img=number)

    @property
    def pairs(self) -> int:
        head = self.detector.bbox_head
        return self.detector.num_queries * (head.cls_out_channels if head.loss_cls.use_sigmoid else 1)
