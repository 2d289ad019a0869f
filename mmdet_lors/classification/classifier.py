"""A timm model as an mmengine model: loss with erasing, Mixup, CutMix and label smoothing, and prediction."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import timm
import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModel, initialize
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from mmdet_lors.errors import UserError


def create_network(model_name: str, **fields) -> nn.Module:
    """Call ``timm.create_model``, with errors of one line.

    Raises:
        UserError: a name that timm does not know, or settings that its model refuses.
    """
    if not timm.is_model(model_name):
        close = get_close_matches(model_name, timm.list_models(), n=3)
        raise UserError(
            f"network.model_name {model_name!r} is not a model of timm {timm.__version__}; "
            + (f"close to it: {', '.join(close)}" if close else "timm.list_models() lists them")
        )
    try:
        return timm.create_model(model_name, **fields)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else f"timm's check of its settings failed: {fields}"
        raise UserError(f"network {model_name}: {reason}") from error


def _build(field: str, kind: Callable, fields: dict) -> Any:
    try:
        return kind(**fields)
    except (AssertionError, TypeError) as error:
        raise UserError(f"{field}: {str(error) or fields}") from error


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """An image classifier; ``network`` is the model as timm builds it.

    Args:
        network: ``model_name`` and further arguments of ``timm.create_model``.
        num_classes: logits per image.
        label_smoothing: share of a target that is spread over all classes, 0 to 1.
        mixup: fields of ``timm.data.Mixup``, such as ``mixup_alpha`` and ``cutmix_alpha``; None leaves images as they
            are.
        random_erasing: fields of timm's ``RandomErasing``, such as ``probability`` and ``mode``: rectangles of
            normalised training images become noise, before ``mixup``. None erases nothing.
        data_preprocessor: mmengine's ``ImgDataPreprocessor`` or another that gives ``inputs`` and ``data_samples``.
        init_cfg: initialisers of ``network``, such as :class:`PretrainedParts`; None keeps timm's own weights.

    Raises:
        UserError: names the field that is wrong.
    """

    def __init__(
        self,
        network: dict,
        num_classes: int,
        label_smoothing: float = 0.0,
        mixup: dict | None = None,
        random_erasing: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        if "model_name" not in network:
            raise UserError(f"network.model_name is missing; network has {', '.join(network) or 'no field'}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.network = create_network(num_classes=num_classes, **network)
        targets = dict(label_smoothing=label_smoothing, num_classes=num_classes)
        self.mixup = _build("mixup", Mixup, mixup | targets) if mixup else None
        self.erase = _build("random_erasing", RandomErasing, random_erasing) if random_erasing else None
        self.criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(label_smoothing)

    def init_weights(self) -> None:
        """Apply ``init_cfg`` to the network, which timm initialised when it built it."""
        if self.init_cfg:
            initialize(self.network, self.init_cfg)
        self._is_init = True

    def forward(
        self, inputs: Tensor, data_samples: Tensor | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict]:
        """Logits, losses or predictions.

        Args:
            inputs: normalised images, (B, C, H, W).
            data_samples: labels, (B,) int64.
            mode: 'tensor', 'loss' or 'predict'.

        Returns:
            'tensor': logits, (B, num_classes). 'loss': see :meth:`loss`. 'predict': see :meth:`predict`.
        """
        if mode == "tensor":
            return self.network(inputs)
        if mode == "loss":
            return self.loss(inputs, data_samples)
        if mode == "predict":
            return self.predict(inputs, data_samples)
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")

    def loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy with smoothed and, with ``mixup``, mixed targets, averaged over images.

        Args:
            images: (B, C, H, W).
            labels: (B,) int64.

        Raises:
            UserError: an odd number of images, which timm's Mixup cannot pair.
        """
        targets = labels
        if self.erase is not None or self.mixup is not None:
            images = images.clone()  # both write into what they are given
        if self.erase is not None:
            self.erase.device = images.device  # where it makes its noise
            images = self.erase(images)
        if self.mixup is not None:
            if len(images) % 2:
                raise UserError(
                    f"mixup needs an even number of images in every batch of a process, got {len(images)}: make "
                    "train_dataloader.batch_size even, with drop_last=True"
                )
            images, targets = self.mixup(images, labels)
        logits = self.network(images)
        # float32 under autocast, but never a lower precision than the network's.
        return dict(loss=self.criterion(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets))

    def predict(self, images: Tensor, labels: Tensor | None = None) -> list[dict]:
        """Per image ``scores``, (num_classes,) probabilities, and ``label``, the true one if it is known, else None."""
        scores = self.network(images).float().softmax(dim=1)
        labels = [None] * len(scores) if labels is None else labels.tolist()
        return [dict(scores=s, label=label) for s, label in zip(scores, labels, strict=True)]
