"""mmdet's preparation of images, without waiting for the device."""

from typing import Any

from mmdet.models import DetDataPreprocessor
from mmdet.registry import MODELS

from mmdet_lors.transfer import constants_do_not_wait


@MODELS.register_module()
class NonBlockingDetDataPreprocessor(DetDataPreprocessor):
    """mmdet's ``DetDataPreprocessor``, with its arguments: normalises, pads and stacks a batch on its device.

    mmengine's waits, at every image whose channels it swaps, until a GPU has done all that was asked of it before.
    """

    def __init__(self, *args: Any, non_blocking: bool = True, **settings: Any) -> None:
        super().__init__(*args, non_blocking=non_blocking, **settings)

    def forward(self, data: dict, training: bool = False) -> dict:
        """As mmdet's."""
        with constants_do_not_wait(self.device):
            return super().forward(data, training)
