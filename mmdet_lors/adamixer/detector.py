"""The detector: backbone, neck, initial queries, decoder."""

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from torch import Tensor

from mmdet_lors.errors import UserError

from .decoder import StageOutput


@MODELS.register_module()
class QueryBased(BaseDetector):
    """A query-based detector: queries placed on the whole image, refined by a decoder over a feature pyramid.

    Args:
        backbone, neck: any of mmdet's; the neck gives one level per decoder stride.
        query_generator: see :class:`InitialQueryGenerator`.
        decoder: see :class:`AdaMixerDecoder`.
        train_cfg, test_cfg: handed to the decoder.
        data_preprocessor, init_cfg: as in every mmdet detector.
        channels_last: lay images out channels last, and with them all that the backbone's convolutions make of them;
            'cpu' for on a CPU alone. For layers that know this layout: PyTorch's do, mmcv's deformable ones do not.

    Raises:
        UserError: decoder, neck and queries that do not fit together.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        query_generator: dict,
        decoder: dict,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
        channels_last: bool | str = False,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        if channels_last not in (True, False, "cpu"):
            raise UserError(f"model.channels_last must be True, False or 'cpu', got {channels_last!r}")
        self.channels_last = channels_last
        self.backbone = MODELS.build(backbone)
        self.neck = MODELS.build(neck)
        self.query_generator = MODELS.build(query_generator)
        self.decoder = MODELS.build(decoder, default_args=dict(train_cfg=train_cfg, test_cfg=test_cfg))
        self._check_fit(neck, query_generator, decoder)
        kept = self.decoder.early_exit.keep_queries
        if kept and kept[0] > self.query_generator.num_queries:
            raise UserError(
                f"test_cfg.keep_queries begins with {kept[0]}, but there are {self.query_generator.num_queries} queries"
            )

    @staticmethod
    def _check_fit(neck: dict, query_generator: dict, decoder: dict) -> None:
        strides, levels = decoder["featmap_strides"], neck.get("in_channels", ())
        if levels and neck.get("num_outs", len(levels)) != len(strides):
            raise UserError(f"decoder.featmap_strides has {len(strides)} entries for {len(levels)} neck levels")
        stage = decoder["stage"]
        pairs = (
            ("neck.out_channels", neck.get("out_channels"), "feat_channels"),
            ("query_generator.content_dim", query_generator.get("content_dim"), "content_dim"),
        )
        for name, value, field in pairs:
            if None not in (value, stage.get(field)) and value != stage[field]:
                raise UserError(f"{name} {value} differs from decoder.stage.{field} {stage[field]}")

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> feature levels."""
        if self.channels_last in (True, batch_inputs.device.type):
            batch_inputs = batch_inputs.contiguous(memory_format=torch.channels_last)
        return self.neck(self.backbone(batch_inputs))

    def _start(
        self, batch_inputs: Tensor, batch_data_samples: SampleList | None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Feature levels, initial positions and initial content."""
        if batch_data_samples is None:
            img_shapes = [tuple(batch_inputs.shape[-2:])] * len(batch_inputs)
        else:
            img_shapes = [sample.metainfo["img_shape"] for sample in batch_data_samples]
        return self.extract_feat(batch_inputs), *self.query_generator(img_shapes)

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of every decoder stage."""
        return self.decoder.loss(*self._start(batch_inputs, batch_data_samples), batch_data_samples)

    def predict(self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True) -> SampleList:
        """The data samples with ``pred_instances`` filled in."""
        results = self.decoder.predict(
            *self._start(batch_inputs, batch_data_samples), batch_data_samples, rescale=rescale
        )
        return self.add_pred_to_datasample(batch_data_samples, results)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: SampleList | None = None) -> list[StageOutput]:
        """Raw outputs of every stage; each image counts as full when no data samples are given."""
        return self.decoder(*self._start(batch_inputs, batch_data_samples))
