"""The decoder: S stages that refine the queries, and the detections of the last one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.config import ConfigDict
from mmengine.model import ModuleList
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_lors.errors import UserError
from mmdet_lors.lors import LORSA, LORST
from mmdet_lors.transfer import to_device

from .boxes import xyzr_to_xyxy
from .criterion import Criterion
from .early_exit import EarlyExit
from .sampling.backends import BACKENDS, arrange
from .stage import StageOutput

Half = TypeVar("Half", LORSA, LORST)

LORS_FIELDS = {
    "adaptive": ("rank", "groups", "shared", "shared_init", "path"),
    "static": ("rank", "groups", "shared", "path"),
}


def check_lors(lors: dict | None) -> dict[str, dict]:
    """The halves of a ``lors`` field that are switched on.

    Raises:
        UserError: an unknown half or field, a half that is not a dict, or no half at all.
    """
    if lors is None:
        return {}
    halves = {name: half for name, half in lors.items() if half is not None}
    if not halves:
        raise UserError("lors is empty: name 'adaptive', 'static' or both, or set lors=None")
    for name, half in halves.items():
        if name not in LORS_FIELDS:
            raise UserError(f"lors.{name} is unknown; known: {', '.join(LORS_FIELDS)}")
        if not isinstance(half, dict):
            raise UserError(f"lors.{name} must be a dict, got {half!r}")
        for field in half:
            if field not in LORS_FIELDS[name]:
                raise UserError(f"lors.{name}.{field} is unknown; known: {', '.join(LORS_FIELDS[name])}")
    return halves


@MODELS.register_module()
class AdaMixerDecoder(Criterion):
    """AdaMixer's decoder, plain or with LORS.

    Args:
        num_stages: S.
        num_classes: classes, without background.
        featmap_strides: stride of each feature level in pixels.
        stage: config of the stages, all alike.
        lors: ``dict(adaptive=dict(rank, groups, shared, shared_init, path), static=dict(rank, groups, shared, path))``:
            'adaptive' makes M and S of all stages with one LORSA, 'static' their output projections with one
            LORST. Either half may be left out; ``rank`` and ``groups`` are one integer or one per stage.
        loss_cls, loss_bbox, loss_iou: losses of every stage.
        sampling: back end of 3D sampling, see :func:`~mmdet_lors.adamixer.sampling.backends.arrange`.
        compile: compile every stage with ``torch.compile``, as one graph each; a dict holds its arguments.
        train_cfg: ``dict(assigner=...)``, a Hungarian assigner; its match costs are used.
        test_cfg: ``dict(max_per_img=..., num_stages=..., keep_queries=...)``: how many detections an image has, and
            how far prediction goes, see :class:`~mmdet_lors.adamixer.early_exit.EarlyExit`.

    Raises:
        UserError: a field of ``lors`` or ``test_cfg`` that is unknown or does not fit the stages; a stage that cannot
            be built.
    """

    def __init__(
        self,
        num_stages: int,
        num_classes: int,
        featmap_strides: Sequence[int],
        stage: dict,
        loss_cls: dict,
        loss_bbox: dict,
        loss_iou: dict,
        lors: dict | None = None,
        sampling: str = "auto",
        compile: bool | dict = False,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(num_classes, loss_cls, loss_bbox, loss_iou, train_cfg and train_cfg["assigner"], init_cfg)
        if sampling not in ("auto", *BACKENDS):
            raise UserError(f"decoder.sampling must be one of auto, {', '.join(BACKENDS)}, got {sampling!r}")
        self.sampling = sampling
        self.featmap_strides = list(featmap_strides)
        self.num_stages = num_stages
        self.set_test_cfg(**(test_cfg or {}))

        halves = check_lors(lors)
        stage = ConfigDict(
            stage,
            num_classes=num_classes,
            own_generator="adaptive" not in halves,
            own_out_proj="static" not in halves,
        )
        self.stages = ModuleList(MODELS.build(stage) for _ in range(num_stages))
        if compile:
            for built in self.stages:
                built.compile(fullgraph=True, **(compile if isinstance(compile, dict) else {}))
        mixing = self.stages[0].mixing
        content_dim = mixing.norm.normalized_shape[0]
        sizes = content_dim, mixing.shapes, mixing.copies, num_stages
        self.lorsa = self._build_half("adaptive", partial(LORSA, *sizes), halves)
        self.lorst = self._build_half("static", partial(LORST, mixing.out_features, content_dim, num_stages), halves)

    def set_test_cfg(
        self, max_per_img: int = 100, num_stages: int | None = None, keep_queries: Sequence[int] = (), **unknown: object
    ) -> None:
        """Predict in another way from now on; see ``test_cfg`` of the class."""
        if unknown:
            raise UserError(f"test_cfg.{next(iter(unknown))} is unknown; known: max_per_img, num_stages, keep_queries")
        self.max_per_img = max_per_img
        self.early_exit = EarlyExit(self.num_stages if num_stages is None else num_stages, keep_queries)
        if self.early_exit.num_stages > self.num_stages:
            raise UserError(f"test_cfg.num_stages is {num_stages}, but the decoder has {self.num_stages} stages")

    @staticmethod
    def _build_half(name: str, build: Callable[..., Half], halves: dict[str, dict]) -> Half | None:
        try:
            return build(**halves[name]) if name in halves else None
        except ValueError as error:
            raise UserError(f"lors.{name}.{error}") from error

    def init_weights(self) -> None:
        """Initialise the stages, then what LORS shares between them."""
        super().init_weights()
        for half in (self.lorsa, self.lorst):
            if half is not None:
                half.reset_parameters()

    def forward(
        self, feats: Sequence[Tensor], xyzr: Tensor, content: Tensor, until: EarlyExit | None = None
    ) -> list[StageOutput]:
        """Run all stages; each starts from the detached positions of the one before.

        Args:
            feats: L levels (B, feat_channels, H_l, W_l).
            xyzr: initial positions (B, N, 4).
            content: initial content (B, N, d).
            until: how far to go; None for all the way.

        Returns:
            One :class:`StageOutput` per stage that ran.
        """
        until = until or EarlyExit(self.num_stages)
        if len(feats) != len(self.featmap_strides):
            raise UserError(
                f"decoder.featmap_strides has {len(self.featmap_strides)} entries for {len(feats)} feature levels"
            )
        pyramid = arrange(feats, self.featmap_strides, self.stages[0].mixing.copies, self.sampling)
        generators = None if self.lorsa is None else self.lorsa.for_pass()
        projections = None if self.lorst is None else self.lorst.for_pass()
        outputs, positions, contents = [], xyzr, content
        for i in range(until.num_stages):
            generate = self.lorsa and partial(self.lorsa, layer=i, folded=generators and generators.layers)
            project = self.lorst and partial(self.lorst, layer=i, folded=projections and projections.layers)
            cls_score, positions, contents = self.stages[i](pyramid, positions, contents, generate, project)
            outputs.append(StageOutput(cls_score, positions, xyzr_to_xyxy(positions), contents))
            positions, contents = until.next(i, outputs[-1])
            positions = positions.detach()
        served = (self.lorsa, generators), (self.lorst, projections)
        if any([half is not None and half.outdated(layers) for half, layers in served]):
            return self.forward(feats, xyzr, content, until)
        return outputs

    def predict(
        self,
        feats: Sequence[Tensor],
        xyzr: Tensor,
        content: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = True,
    ) -> list[InstanceData]:
        """Detections: sigmoid scores, the ``max_per_img`` best over queries x classes, no NMS.

        Returns:
            Per image: scores (n,), labels (n,), bboxes (n, 4), in the original image's pixels with ``rescale``.
        """
        bboxes, scores, labels = self.detect(feats, xyzr, content)
        if rescale:
            scales = [[1 / s for s in sample.metainfo["scale_factor"]] * 2 for sample in batch_data_samples]
            bboxes = bboxes * to_device(scales, bboxes)[:, None]
        images = zip(bboxes, scores, labels, strict=True)
        return [InstanceData(scores=s, labels=label, bboxes=b) for b, s, label in images]

    def detect(self, feats: Sequence[Tensor], xyzr: Tensor, content: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The k = min(max_per_img, N * num_classes) best pairs of query and class, as ``test_cfg`` has it.

        Args:
            feats, xyzr, content: see :meth:`forward`.

        Returns:
            Boxes (B, k, 4), scores (B, k) and labels (B, k), best first.
        """
        output = self(feats, xyzr, content, self.early_exit)[-1]
        scores = output.cls_score.sigmoid().flatten(1)
        scores, index = scores.topk(min(self.max_per_img, scores.shape[1]))
        queries = (index // self.num_classes)[..., None].expand(-1, -1, 4)
        return output.bboxes.gather(1, queries), scores, index % self.num_classes
