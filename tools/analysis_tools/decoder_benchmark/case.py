"""What the benchmark of the decoder times: its variants, each ready to run on random inputs."""

from functools import cache
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import nn

from mmdet_lors.adamixer.stage import StageOutput
from mmdet_lors.analysis.complexity import measure
from mmdet_lors.analysis.timing import seconds
from mmdet_lors.lors.serving import serve

from .naive import NaiveDecoder
from .variants import VARIANTS

ROOT = Path(__file__).parents[3]
CONFIG = "configs/lors/adamixer-lors_r50_100-queries_1x_coco.py"
OBJECTS = 7
"""Objects in every image."""


PASSES = {"inference": 1, "backward": 3}
"""How often a work does the forward pass's products: a product's backward pass has two of its size."""


class MatrixProduct:
    """One product of two large matrices, for the rate that the machine reaches.

    Args:
        device: 'cpu' or 'cuda'.
    """

    side = 4096

    def __init__(self, device: str) -> None:
        self.device, self.factors = device, torch.randn(2, self.side, self.side, device=device)

    def __call__(self) -> float:
        """Multiply once; returns seconds."""
        return seconds(lambda: torch.mm(*self.factors), self.device)


@cache
def products(name: str, queries: int, size: tuple[int, int]) -> int:
    """Multiply-adds of the products of one image in a plain decoder with this variant's groups and points."""
    model = Config.fromfile(ROOT / CONFIG).model
    model.query_generator.num_queries, model.decoder.lors = queries, None
    model.decoder.stage.num_groups, model.decoder.stage.in_points = VARIANTS[name].sampling
    return measure(model, size).decoder.products


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is minimised."""
    return sum(value for name, value in losses.items() if "loss" in name)


class Case:
    """One variant, ready to run one kind of work on fixed random inputs.

    Args:
        name: of the variant.
        work: key of :data:`WORKS`.
        queries, batch: N and B.
        size: (W, H) in pixels.
        level: 'decoder', on random feature levels, or 'detector', with its ResNet-50.
        device: 'cpu' or 'cuda'.
        stages: S; 6 in all of the paper's models.
        amp: data type of autocast, and of random feature levels; None for float32 throughout.
        compile, sampling: as the decoder takes them.
    """

    def __init__(
        self, name: str, work: str, queries: int, batch: int, size: tuple[int, int], level: str, device: str,
        stages: int = 6, amp: torch.dtype | None = None, compile: bool | dict = False, sampling: str = "auto",
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        variant = VARIANTS[name]
        model = Config.fromfile(ROOT / CONFIG).model
        model.backbone.init_cfg = None
        model.query_generator.num_queries = queries
        decoder = model.decoder
        decoder.stage.num_groups, decoder.stage.in_points = variant.sampling
        decoder.num_stages, decoder.lors.adaptive.groups = stages, (decoder.lors.adaptive.groups * stages)[:stages]
        decoder.compile, decoder.sampling = compile, sampling
        for half, options in variant.options.items():
            decoder.lors[half] = options and dict(decoder.lors[half], **options)
        if not variant.lors:
            decoder.lors = None
        if variant.naive:
            decoder.type = NaiveDecoder
        with torch.device(device):  # a GPU draws a hundred million random numbers at once
            self.model = MODELS.build(model)
            self.model.decoder.init_weights()
        for parameter in self.model.decoder.parameters():
            if not parameter.any():  # Zeros may be multiplied faster, and hide a path's gradient.
                nn.init.normal_(parameter, std=0.01)
        if level == "decoder":
            del self.model.backbone, self.model.neck
        self.model.to(device).train(work != "inference")
        if variant.served:
            serve(self.model)
        self.work, self.device, self.amp = work, device, amp
        width, height = size
        self.feats, self.images = None, None
        if level == "decoder":
            shapes = [(batch, 256, height // s, width // s) for s in decoder.featmap_strides]
            options = dict(device=device, dtype=amp, requires_grad=work != "inference")
            self.feats = [torch.randn(shape, **options) for shape in shapes]
        else:
            self.images = torch.randn(batch, 3, height, width, device=device)
        self.samples = [self._sample(width, height) for _ in range(batch)]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True) if work == "step" else None
        self.predicted = self.outputs() if work == "matching" else None

    def _sample(self, width: int, height: int) -> DetDataSample:
        corner = torch.rand(OBJECTS, 2) * torch.tensor([width, height]) / 2
        boxes = torch.cat([corner, corner + 20 + torch.rand(OBJECTS, 2) * 100], dim=1).to(self.device)
        labels = torch.randint(80, (OBJECTS,), device=self.device)
        sample = DetDataSample(metainfo=dict(img_shape=(height, width), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        return sample

    def __call__(self) -> float:
        """Do the work once.

        Returns:
            Seconds.
        """
        return seconds(self.run, self.device, 50 if self.work == "matching" else 1)

    def run(self) -> None:
        """Do the work once, and do not wait for a GPU's end."""
        for tensor in (*self.model.parameters(), *(self.feats or ())):
            tensor.grad = None
        self._work()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, dtype=self.amp, enabled=self.amp is not None)

    def _start(self) -> tuple:
        """Feature levels, initial positions and content."""
        feats = self.feats or self.model.extract_feat(self.images)
        return feats, *self.model.query_generator([s.metainfo["img_shape"] for s in self.samples])

    def outputs(self) -> list[StageOutput]:
        """What every stage predicts."""
        with torch.no_grad(), self._autocast():
            return self.model.decoder(*self._start())

    def losses(self) -> dict[str, torch.Tensor]:
        """Every stage's losses."""
        with self._autocast():
            return self.model.decoder.loss(*self._start(), self.samples)

    def _work(self) -> None:
        if self.work == "inference":
            with torch.no_grad(), self._autocast():
                self.model.decoder.predict(*self._start(), self.samples)
        elif self.work == "matching":
            self.model.decoder.assign(self.predicted, self.samples)
        else:
            total(self.losses()).backward()
        if self.optimizer:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
