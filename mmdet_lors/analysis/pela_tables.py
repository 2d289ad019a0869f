"""Tables 1 to 9 of the PELA paper as data, and as Markdown with our counts beside the paper's.

Accuracies, memory and times are the paper's: this project counts, it did not train on the paper's data.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import timm
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.errors import UserError
from mmdet_lors.pela import compress
from mmdet_lors.pela.distiller import merged

from .albef import ALBEF, IMAGE_SIZE
from .complexity import OperationCounter

COMMAND = "python tools/analysis_tools/model_report.py --paper pela > docs/pela_tables.md"
PACKAGES = {"mmseg": "mmsegmentation", "transformers": "transformers"}
TOLERANCE = 0.02
"""A difference above it has a reason."""

ADE20K, COCO, PROPOSALS, WORDS = (683, 512), (1088, 800), 1000, 30
"""(W, H) to which an image of 4:3 is resized and padded; proposals of the RPN; words of a text."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class Count:
    """What one model has, and what one forward pass of it takes."""

    parameters: int
    layers: int = 0
    """Multiply-adds of convolutions and Linears."""
    attention: int = 0
    """Multiply-adds of attention's products of activations with activations."""

    def flops(self, attention: bool = False) -> float:
        """Two for each multiply-add."""
        return 2 * (self.layers + attention * self.attention)


class _ProductCounter(OperationCounter):
    """Tells products with weights from products of activations."""

    attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._overloadpacket in (_aten.bmm, _aten.baddbmm):
            self.attention += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
        return out


def count(model: nn.Module, forward: Callable[[], object]) -> Count:
    """Parameters of a model on the meta device, and the products of ``forward``, which calls it or its parts."""
    model.eval()
    # With gradients on, PyTorch's fused inference path for attention, which hides its operations, stays off.
    with _ProductCounter(model).named() as counter, torch.enable_grad():
        forward()
    products = sum(counter.products.values())
    parameters = sum(p.numel() for p in model.parameters())
    return Count(parameters, products - counter.attention, counter.attention)


def _zeros(*shape: int, **kwargs) -> Tensor:
    return torch.empty(*shape, device="meta", **kwargs)


def _image(size: tuple[int, int]) -> Tensor:
    return _zeros(1, 3, size[1], size[0])


def _classifier(name: str, root: Path, size: int = 224, **settings) -> Count:
    """A model of timm."""
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    return count(model, lambda: model(_image((size, size))))


def _student(config: str, root: Path) -> Count:
    """The network that a PELADistiller trains."""
    network = build_without_weights(Config.fromfile(root / config).model).student.network
    return count(network, lambda: network(_image((224, 224))))


def _read(config: str, root: Path, compressed: bool, changes: dict) -> dict:
    """The model of a config of this project, or of a package's where its name has '::', with these fields changed.

    Not ``compressed``: with the backbone as it was before.
    """
    model = get_config(config).model if "::" in config else Config.fromfile(root / config).model
    if not compressed:
        model = dict(model, backbone=model["backbone"]["backbone"])
    return merged(model, changes)


def _segmentor(
    config: str,
    root: Path,
    size: tuple[int, int] = ADE20K,
    windows: int = 1,
    compressed: bool = True,
    changes: dict | None = None,
) -> Count:
    """mmsegmentation's EncoderDecoder on a whole image, or on windows of that size.

    The auxiliary head counts with its parameters; it does not run in a test.
    """
    import mmseg.models  # noqa: F401

    with DefaultScope.overwrite_default_scope("mmseg"):
        cfg = _read(config, root, compressed, changes or {})
        model = build_without_weights(dict(cfg, type="mmseg.EncoderDecoder"))

    def forward() -> None:
        for _ in range(windows):
            maps = model.backbone(_image(size))
            model.decode_head(model.neck(maps) if model.with_neck else maps)

    return count(model, forward)


def _detector(
    config: str, root: Path, compressed: bool = True, changes: dict | None = None, masks: bool = False
) -> Count:
    """Cascade Mask R-CNN: backbone, neck, RPN, and each box head on 1000 proposals; ``masks``: mask heads on 100."""
    model = build_without_weights(_read(config, root, compressed, changes or {}))

    def forward() -> None:
        model.rpn_head(model.neck(model.backbone(_image(COCO))))
        for head in model.roi_head.bbox_head:
            head(_zeros(PROPOSALS, 256, 7, 7))
        for head in model.roi_head.mask_head if masks else ():
            head(_zeros(100, 256, 14, 14))

    return count(model, forward)


def _albef(root: Path, answers: bool = False, ratio: float | None = None) -> Count:
    """ALBEF as its training holds it; one pass of one image and one text."""
    with torch.device("meta"):
        model = ALBEF(answers)
    if ratio is not None:
        compress(model, ratio, ("norm", "matching"), approximate=False, inplace=True)
    text = _zeros(1, WORDS, dtype=torch.long)
    return count(model, lambda: model(_image((IMAGE_SIZE, IMAGE_SIZE)), text))


def _transformers(name: str, root: Path, **settings) -> Count:
    """Parameters of a model of transformers that answers questions."""
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**settings)
        model = getattr(transformers, f"{name}ForQuestionAnswering")(config)
    return Count(sum(p.numel() for p in model.parameters()))


DISTILLER = "configs/pela/pela-distiller_{}_imagenet.py"
UPERNET = "configs/pela/upernet_pela-{}_8xb2-160k_ade20k-512x512.py"
CASCADE = "configs/pela/cascade-mask-rcnn_pela-swin-base_crop-ms-480-800-3x_coco.py"
MAE = "mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"
UPERNET_R101 = "mmseg::upernet/upernet_r101_4xb4-80k_ade20k-512x512.py"
CASCADE_PLAIN = "mmdet::cascade_rcnn/cascade-mask-rcnn_{}_fpn_1x_coco.py"

EVERY_LINEAR = dict(backbone=dict(ratio=2, omit=["norm", "patch_embed", "downsample"]))
"""What the paper's downstream Swin-B has, as its parameters and FLOPs say."""

VIT_LARGE = dict(model_name="deit3_large_patch16_224", out_indices=[5, 11, 17, 23])
NARROW = dict(decode_head=dict(in_channels=[1024] * 4), auxiliary_head=dict(in_channels=1024))
WIDE = dict(NARROW, decode_head=dict(in_channels=[1024] * 4, channels=1024))
ALBEF_LAYERS = "[ALBEF's layers](../mmdet_lors/analysis/albef.py)"
LARGE = "DeiT-III-L in the config of DeiT-B, UPerHead of 1024 channels"


def _link(path: str, prefix: str = "") -> str:
    return f"{prefix}[{Path(path).stem}](../{path})"


MODELS: dict[str, tuple[str, Callable[[Path], Count]]] = {
    "vit": ("timm vit_base_patch16_224", partial(_classifier, "vit_base_patch16_224")),
    "crossvit": ("timm crossvit_base_240, 240 x 240", partial(_classifier, "crossvit_base_240", size=240)),
    "regnet": ("timm regnety_160", partial(_classifier, "regnety_160")),
    "deit": ("timm deit_base_patch16_224", partial(_classifier, "deit_base_patch16_224")),
    "swin": ("timm swin_base_patch4_window7_224", partial(_classifier, "swin_base_patch4_window7_224")),
    "deit3": ("timm deit3_large_patch16_224", partial(_classifier, "deit3_large_patch16_224")),
    "deit-pela": (_link(DISTILLER.format("deit-base")), partial(_student, DISTILLER.format("deit-base"))),
    "swin-pela": (_link(DISTILLER.format("swin-base")), partial(_student, DISTILLER.format("swin-base"))),
    "deit3-pela": (_link(DISTILLER.format("deit3-large")), partial(_student, DISTILLER.format("deit3-large"))),
    "deit-half": ("", partial(_classifier, "deit_base_patch16_224", depth=6)),
    "swin-half": ("", partial(_classifier, "swin_base_patch4_window7_224", depths=(2, 2, 9, 2))),
    "deit3-half": ("", partial(_classifier, "deit3_large_patch16_224", depth=12)),
    "seg-r101": ("mmsegmentation upernet_r101", partial(_segmentor, UPERNET_R101)),
    "seg-mae": ("mmsegmentation mae-base_upernet", partial(_segmentor, MAE, size=(512, 512), windows=2)),
    "seg-deit": (
        _link(UPERNET.format("deit-base"), "not compressed: "),
        partial(_segmentor, UPERNET.format("deit-base"), compressed=False),
    ),
    "seg-deit-pela": (_link(UPERNET.format("deit-base")), partial(_segmentor, UPERNET.format("deit-base"))),
    "seg-swin": (
        _link(UPERNET.format("swin-base"), "not compressed: "),
        partial(_segmentor, UPERNET.format("swin-base"), compressed=False),
    ),
    "seg-swin-pela": (_link(UPERNET.format("swin-base")), partial(_segmentor, UPERNET.format("swin-base"))),
    "seg-swin-every": ("", partial(_segmentor, UPERNET.format("swin-base"), changes=EVERY_LINEAR)),
    "seg-deit3": (
        LARGE,
        partial(_segmentor, UPERNET.format("deit-base"), compressed=False, changes=dict(WIDE, backbone=VIT_LARGE)),
    ),
    "seg-deit3-pela": (
        LARGE,
        partial(_segmentor, UPERNET.format("deit-base"), changes=dict(WIDE, backbone=dict(backbone=VIT_LARGE))),
    ),
    "seg-deit3-narrow": (
        "",
        partial(_segmentor, UPERNET.format("deit-base"), compressed=False, changes=dict(NARROW, backbone=VIT_LARGE)),
    ),
    "det-r50": ("mmdet cascade-mask-rcnn_r50_fpn", partial(_detector, CASCADE_PLAIN.format("r50"))),
    "det-x101": ("mmdet cascade-mask-rcnn_x101-32x4d_fpn", partial(_detector, CASCADE_PLAIN.format("x101-32x4d"))),
    "det-swin": (_link(CASCADE, "not compressed: "), partial(_detector, CASCADE, compressed=False)),
    "det-swin-masks": ("", partial(_detector, CASCADE, compressed=False, masks=True)),
    "det-swin-pela": (_link(CASCADE), partial(_detector, CASCADE)),
    "det-swin-every": ("", partial(_detector, CASCADE, changes=EVERY_LINEAR)),
    "albef": (ALBEF_LAYERS, _albef),
    "albef-pela": (f"{ALBEF_LAYERS}, ratio 3", partial(_albef, ratio=3)),
    "albef-vqa": (f"{ALBEF_LAYERS} with the decoder of answers", partial(_albef, answers=True)),
    "albef-vqa-pela": (f"{ALBEF_LAYERS} with the decoder of answers, ratio 3", partial(_albef, answers=True, ratio=3)),
    "visualbert": ("transformers VisualBERT", partial(_transformers, "VisualBert", num_labels=3129)),
    "vilt": ("transformers ViLT", partial(_transformers, "Vilt", num_labels=3129)),
    "lxmert": ("transformers LXMERT", partial(_transformers, "Lxmert", num_qa_labels=3129)),
}
"""Key -> what a reader finds it as, and how it is counted."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    labels: tuple[str, ...]
    paper: tuple[float | None, float | None]
    """Parameters in millions; FLOPs in the table's unit."""
    accuracy: tuple[float | str | None, ...]
    model: str | None = None
    """Key of :data:`MODELS`; None where it is not built, for a reason."""
    reason: str | None = None
    """Key of :data:`REASONS`: why it differs by more than :data:`TOLERANCE`, or is not built or not run."""
    flops: bool = True
    """Whether the FLOPs of ``model`` are those of the row."""
    attention: bool = False
    """Whether the paper's FLOPs have attention's products."""


@dataclass(frozen=True)
class Table:
    """A table of the paper that counts."""

    number: int
    title: str
    labels: tuple[str, ...]
    unit: str
    accuracy: tuple[str, ...]
    rows: tuple[Row, ...]
    share: float | None = None
    """The FLOPs of which shares are compared, in the unit, where a pass is not known."""
    note: str = ""


REASONS = {
    "elsewhere": (
        "Not built: none of the packages that this project uses has it (timm, torchvision, mmdet, mmsegmentation, "
        "transformers)."
    ),
    "students": (
        "Not built: the paper does not say which layers its students keep. Half of DeiT-B's layers make "
        "{deit_half.M:.1f} M and {deit_half.G:.1f} GFLOPs, half of DeiT-III-L's {deit3_half.M:.1f} M and "
        "{deit3_half.G:.1f}, Swin-B with 9 layers instead of 18 in its third stage {swin_half.M:.1f} M and "
        "{swin_half.G:.1f}: near the paper's figures, and none of them."
    ),
    "tome": (
        "Parameters are those of the base, which ToMe does not change. FLOPs are not counted: they follow from the "
        "number of tokens that are merged in each layer, which the paper does not give."
    ),
    "lora": "Not built: the paper gives neither LoRA's rank nor the layers that have it.",
    "swin-ratio": (
        "The paper's downstream Swin-B is not the one of its Table 1. There a third of the weights goes, attention's "
        "projections stay whole, and 25.6 M are saved; here 42.0 M are. Ratio 2 on every Linear of the blocks saves "
        "that: it makes {seg_swin_every.M:.2f} M and {seg_swin_every.G:.1f} GFLOPs in Table 2, {det_swin_every.M:.2f} "
        "M and {det_swin_every.G:.1f} in Table 3. The configs have Table 1's Swin-B, which is the one that is "
        "pre-trained; for the other set model.backbone.ratio=2 and omit=['norm', 'patch_embed', 'downsample']."
    ),
    "pass": (
        "The paper does not say for how many images and texts its TFLOPs are, nor which passes they contain; ours are "
        "one pass of one image and one text of {words} words. The shares of the whole model's can be compared: every "
        "Linear keeps a third, the patch embedding all. The paper's are up to a point larger, by operations which it "
        "does not name."
    ),
    "answer": (
        "Parameters only, as the paper gives no size of input. transformers' model, with a head of 3,129 answers; the "
        "paper does not say what it counts beyond that."
    ),
    "vilt": "Parameters only: the paper gives no size of input. transformers' model, with a head of 3,129 answers.",
    "uncounted": "Not built: the paper gives no count.",
}
"""Why a row differs or is not built; the figures are filled in from our counts: M parameters, GFLOPs."""

TABLES = (
    Table(
        1,
        "Classification, ImageNet-1K, 224 x 224",
        ("backbone", "method"),
        "GFLOPs",
        ("top-1",),
        (
            Row(("ViT-Base", ""), (86.6, 35.1), (77.9,), "vit", attention=True),
            Row(("CrossViT-B", ""), (105.0, 40.3), (82.2,), "crossvit"),
            Row(("T2T-ViT-24", ""), (64.1, 25.5), (82.3,), reason="elsewhere"),
            Row(("RegNetY-16G", ""), (83.6, 31.9), (82.9,), "regnet"),
            Row(("DeiT", "Base"), (86.6, 33.7), (81.8,), "deit"),
            Row(("DeiT", "TinyBert"), (44.2, 17.3), (78.0,), reason="students"),
            Row(("DeiT", "MaskAlign"), (44.2, 17.3), (78.2,), reason="students"),
            Row(("DeiT", "ToMe"), (86.6, 16.5), (76.4,), "deit", "tome", flops=False),
            Row(("DeiT", "PELA"), (44.1, 17.0), (81.0,), "deit-pela"),
            Row(("Swin-Base", "Base"), (87.8, 30.3), (83.5,), "swin"),
            Row(("Swin-Base", "TinyBert"), (58.6, 20.6), (78.8,), reason="students"),
            Row(("Swin-Base", "MaskAlign"), (58.6, 20.6), (79.1,), reason="students"),
            Row(("Swin-Base", "PELA"), (62.2, 21.3), (82.5,), "swin-pela"),
            Row(("DeiT-III-Large", "Base"), (304.4, 119.4), (84.9,), "deit3"),
            Row(("DeiT-III-Large", "TinyBert"), (156.8, 61.5), (79.2,), reason="students"),
            Row(("DeiT-III-Large", "MaskAlign"), (156.8, 61.5), (79.5,), reason="students"),
            Row(("DeiT-III-Large", "PELA"), (153.2, 59.8), (83.9,), "deit3-pela"),
        ),
        note=(
            "ViT-Base and DeiT have the same layers: the paper's 35.1 contains attention's products, its 33.7 does "
            "not. ViT-Base is compared with ours with attention, every other row with ours without."
        ),
    ),
    Table(
        2,
        "Semantic segmentation, ADE20K, UPerNet",
        ("backbone", "method"),
        "GFLOPs",
        ("mIoU",),
        (
            Row(("ResNet-101", ""), (85.5, 689), (44.9,), "seg-r101"),
            Row(("PatchConvNet-B60", ""), (141.0, 1258), (48.1,), reason="elsewhere"),
            Row(("MAE ViT-B", ""), (163.9, 2343), (48.1,), "seg-mae"),
            Row(("DeiT", "Base"), (121.4, 320.4), (45.0,), "seg-deit"),
            Row(("DeiT", "LoRA"), (124.8, 331.1), (40.6,), reason="lora"),
            Row(("DeiT", "TinyBert"), (79.0, 214.5), (36.4,), reason="students"),
            Row(("DeiT", "MaskAlign"), (79.0, 214.5), (36.8,), reason="students"),
            Row(("DeiT", "PELA"), (78.9, 203.4), (43.2,), "seg-deit-pela"),
            Row(("Swin-Base", "Base"), (121.3, 798.6), (47.7,), "seg-swin"),
            Row(("Swin-Base", "LoRA"), (124.7, 822.6), (44.2,), reason="lora"),
            Row(("Swin-Base", "TinyBert"), (92.1, 721.4), (40.0,), reason="students"),
            Row(("Swin-Base", "MaskAlign"), (92.1, 721.4), (39.6,), reason="students"),
            Row(("Swin-Base", "PELA"), (79.3, 685.3), (47.2,), "seg-swin-pela", "swin-ratio"),
            Row(("DeiT-III-Large", "Base"), (428.4, 1155), (47.0,), "seg-deit3"),
            Row(("DeiT-III-Large", "LoRA"), (440.4, 1190), (44.7,), reason="lora"),
            Row(("DeiT-III-Large", "TinyBert"), (280.8, 784), (38.1,), reason="students"),
            Row(("DeiT-III-Large", "MaskAlign"), (280.8, 784), (38.4,), reason="students"),
            Row(("DeiT-III-Large", "PELA"), (277.2, 739), (45.6,), "seg-deit3-pela"),
        ),
        note=(
            "The paper gives no input size. {ade[0]} x {ade[1]}, to which an image of 4:3 is resized, fits every row "
            "that is built, Swin-Base's PELA as in [{n[swin-ratio]}]; MAE's configuration cuts it into two windows of "
            "512 x 512. The paper does not give the width of DeiT-III-L's UPerHead either: as wide as the backbone it "
            "fits; with 512 channels, as in the other rows, the model would have {seg_deit3_narrow.M:.1f} M and "
            "{seg_deit3_narrow.G:.0f} GFLOPs. With "
            "ImageNet's classifier still in the backbone the four ViTs would have {with_classifier} M, which is what "
            "the paper prints, to 0.1 M; ours have none."
        ),
    ),
    Table(
        3,
        "Object detection, COCO, Cascade Mask R-CNN",
        ("backbone", "method"),
        "GFLOPs",
        ("AP box",),
        (
            Row(("ResNet-50", ""), (77.3, 411.0), (46.3,), "det-r50"),
            Row(("ResNeXt-101-32", ""), (96.0, 546.1), (48.1,), "det-x101"),
            Row(("Swin-Base", "Base"), (145.0, 1501), (50.1,), "det-swin"),
            Row(("Swin-Base", "LoRA"), (149.0, 1547), (46.1,), reason="lora"),
            Row(("Swin-Base", "TinyBert"), (115.8, 1302), (41.1,), reason="students"),
            Row(("Swin-Base", "MaskAlign"), (115.8, 1302), (41.1,), reason="students"),
            Row(("Swin-Base", "PELA"), (103.0, 1232), (49.0,), "det-swin-pela", "swin-ratio"),
        ),
        note=(
            "The paper says neither the input size nor which heads its GFLOPs contain. {coco[0]} x {coco[1]}, an image "
            "of 4:3 resized and padded, with backbone, neck, RPN and three box heads on 1000 proposals, fits every "
            "row that is built, PELA's as in [{n[swin-ratio]}]; with the mask heads on 100 boxes Swin-Base would take "
            "{det_swin_masks.G:.0f} GFLOPs."
        ),
    ),
    Table(
        4,
        "Retrieval with ALBEF",
        ("data", "model"),
        "TFLOPs",
        ("TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"),
        tuple(
            Row((data, *labels), paper, accuracy, *rest)
            for data, rows in {
                "Flickr30K": (
                    (("UNITER",), (110, 0.37), (87.3, 98.0, 99.2, 75.6, 94.1, 96.8), None, "elsewhere"),
                    (("VILLA",), (110, None), (87.9, 97.5, 98.8, 76.3, 94.2, 96.8), None, "elsewhere"),
                    (("ALBEF Base",), (419, 7.41), (93.4, 99.5, 99.6, 80.6, 95.8, 98.0), "albef", "pass"),
                    (("ALBEF LoRA",), (431, 7.49), (92.1, 99.2, 99.0, 80.2, 95.6, 97.7), None, "lora"),
                    (("ALBEF TinyBERT",), (230, 4.66), (57.6, 82.8, 89.9, 40.8, 70.6, 79.4), None, "students"),
                    (("ALBEF MaskAlign",), (230, 4.66), (59.0, 84.2, 90.9, 41.1, 70.4, 80.5), None, "students"),
                    (("ALBEF ToMe",), (419, 2.61), (74.8, 92.6, 96.4, 62.0, 86.2, 91.5), "albef", "tome", False),
                    (("ALBEF PELA",), (173, 2.58), (91.6, 99.3, 99.6, 79.7, 94.8, 97.5), "albef-pela", "pass"),
                ),
                "MSCOCO": (
                    (("UNITER",), (110, 0.37), (65.7, 88.6, 93.8, 52.9, 79.9, 88.0), None, "elsewhere"),
                    (("OSCAR",), (110, None), (70.0, 91.1, 95.5, 54.0, 80.8, 88.5), None, "elsewhere"),
                    (("ALBEF Base",), (419, 7.41), (72.6, 91.2, 95.2, 54.9, 80.5, 88.1), "albef", "pass"),
                    (("ALBEF LoRA",), (431, 7.49), (73.2, 91.7, 95.9, 56.5, 81.3, 88.9), None, "lora"),
                    (("ALBEF TinyBERT",), (230, 4.66), (33.6, 62.1, 74.8, 22.6, 49.8, 63.2), None, "students"),
                    (("ALBEF MaskAlign",), (230, 4.66), (35.7, 64.9, 77.3, 24.2, 52.5, 65.5), None, "students"),
                    (("ALBEF ToMe",), (419, 2.61), (56.2, 82.3, 90.1, 41.7, 71.0, 81.3), "albef", "tome", False),
                    (("ALBEF PELA",), (173, 2.58), (71.6, 91.0, 95.3, 55.1, 80.8, 88.3), "albef-pela", "pass"),
                ),
            }.items()
            for labels, paper, accuracy, *rest in rows
        ),
        share=7.41,
    ),
    Table(
        5,
        "Visual entailment and visual question answering with ALBEF; counted on the latter",
        ("model",),
        "TFLOPs",
        ("SNLI-VE val", "SNLI-VE test", "VQA test-dev", "VQA test-std"),
        (
            Row(("VisualBERT",), (134, 0.37), (None, None, 70.80, 71.00), "visualbert", "answer", flops=False),
            Row(("ViLT",), (118, 1.01), (None, None, 70.94, None), "vilt", "vilt", flops=False),
            Row(("LXMERT",), (224, 0.41), (None, None, 72.42, 72.54), "lxmert", "answer", flops=False),
            Row(("UNITER",), (116, 0.37), (78.59, 78.28, 72.70, 72.91), reason="elsewhere"),
            Row(("12-in-1",), (None, None), (None, 76.59, 73.15, None), reason="uncounted"),
            Row(("ALBEF Base",), (581, 7.05), (79.29, 79.79, 74.55, 74.89), "albef-vqa", "pass"),
            Row(("ALBEF LoRA",), (644, 7.14), (79.34, 79.53, 71.07, None), reason="lora"),
            Row(("ALBEF TinyBERT",), (392, 4.55), (73.83, 73.31, 61.33, None), reason="students"),
            Row(("ALBEF MaskAlign",), (392, 4.55), (73.74, 73.48, 63.85, None), reason="students"),
            Row(("ALBEF ToMe",), (581, 2.55), (77.58, 78.02, 68.59, None), "albef-vqa", "tome", flops=False),
            Row(("ALBEF PELA",), (259, 2.47), (78.55, 78.66, 73.84, 73.87), "albef-vqa-pela", "pass"),
        ),
        share=7.05,
    ),
)

UNCOUNTED = (
    (
        "Table 6: Weakly supervised visual grounding",
        ("model", "Val (paper)", "TestA (paper)", "TestB (paper)"),
        (
            ("ARN", "32.78", "34.35", "32.13"),
            ("CCL", "34.29", "36.91", "33.56"),
            ("ALBEF Base", "57.94", "65.07", "45.75"),
            ("ALBEF PELA", "57.06", "65.85", "45.10"),
        ),
        "The paper gives no parameters and no FLOPs here.",
    ),
    (
        "Table 7: The two losses",
        (
            "model",
            *(
                f"{name} (paper)"
                for name in (
                    "DeiT top-1",
                    "DeiT mIoU",
                    "Swin top-1",
                    "Swin mIoU",
                    "ALBEF TR@1",
                    "ALBEF IR@1",
                    "SNLI-VE val",
                    "SNLI-VE test",
                    "VG TestA",
                    "VG TestB",
                )
            ),
        ),
        (
            ("Base", "81.80", "44.99", "83.50", "47.68", "72.64", "54.91", "79.29", "79.79", "65.07", "45.75"),
            ("PELA", "61.08", "24.42", "77.60", "28.80", "65.94", "49.45", "76.10", "76.21", "61.36", "41.36"),
            ("PELA", "80.90", "43.67", "82.89", "47.28", "70.66", "54.55", "78.35", "78.07", "65.70", "44.90"),
            ("PELA", "80.55", "42.94", "82.86", "47.24", "71.44", "54.43", "78.50", "78.39", "66.24", "44.57"),
            ("PELA", "80.96", "43.24", "82.54", "47.21", "71.26", "54.75", "78.55", "78.66", "65.86", "45.10"),
        ),
        "Every PELA row has the parameters and FLOPs of PELA in Tables 1, 2, 4 and 5: the losses change neither. Which "
        "row has which loss is lost in the text that we have; the first of PELA has neither, as its section 4.4 says, "
        "and the last the figures of the main tables. In a distiller's config `model.feature_loss=None` and "
        "`model.perturbation_loss=None` leave a loss out.",
    ),
    (
        "Table 8: Pre-training efficiency",
        ("model", "batch (paper)", "GPU memory, GB (paper)", "latency, ms per image (paper)"),
        (("DeiT-B", "64 x 4", "12.77", "76.24"), ("DeiT-B, PELA", "64 x 4", "11.34", "70.06")),
        "Not measured by this project: it is a training step on GPUs that the paper does not name. Their counts are in "
        "Table 1; `tools/analysis_tools/benchmark_pela.py` measures inference of both on the machine at hand.",
    ),
    (
        "Table 9: Larger batches in segmentation",
        ("model", "batch (paper)", "Base mIoU (paper)", "PELA mIoU (paper)", "PELA, larger batch, mIoU (paper)"),
        (("DeiT-B", "16 -> 20", "44.99", "43.24", "43.81"), ("Swin-B", "16 -> 20", "47.68", "47.21", "47.99")),
        "The models are those of Table 2; the paper gives no counts here.",
    ),
)
"""(title, header, rows, note) of the tables without counts."""


class Counts:
    """Counts of the models in :data:`MODELS`, each counted once.

    Args:
        root: the project's folder.
    """

    def __init__(self, root: Path) -> None:
        self._count = cache(lambda key: MODELS[key][1](root=root))

    def __call__(self, key: str) -> Count:
        """Of the model with this key."""
        return self._count(key)


def missing_packages() -> list[str]:
    """Those of :data:`PACKAGES` that are not installed."""
    return [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]


def differences(table: Table, row: Row, counts: Counts) -> dict[str, float]:
    """What is compared -> (ours - paper) / paper; nothing for a row that is not built."""
    if row.model is None:
        return {}
    ours, (parameters, flops) = counts(row.model), row.paper
    found = {"parameters": ours.parameters / 1e6 / parameters - 1}
    if row.flops and table.share is None:
        found[table.unit] = ours.flops(row.attention) / 1e9 / flops - 1
    elif row.flops:
        found["share"] = _share(table, ours, counts) / (100 * flops / table.share) - 1
    return found


def _share(table: Table, ours: Count, counts: Counts) -> float:
    """Per cent of the FLOPs of the table's whole model."""
    whole = next(row.model for row in table.rows if row.paper[1] == table.share)
    return 100 * ours.layers / counts(whole).layers


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(header), "|" + "---|" * len(header), *map(_row, rows), ""]


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %" if abs(value) >= 0.0005 else "0.0 %"


def _cell(value: float | str | None) -> str:
    return "-" if value is None else str(value)


def _table(table: Table, counts: Counts, numbers: dict[str, int]) -> list[str]:
    scale, digits = (1e9, 1) if table.unit == "GFLOPs" else (1e12, 3)
    header = [*table.labels, "built from", "parameters, M (paper)", "(ours)", f"{table.unit} (paper)", "(ours)"]
    header += ["with attention's products (ours)"]
    header += ["per cent of Base's (paper)", "(ours)"] if table.share else []
    header += [*(f"{name} (paper)" for name in table.accuracy), "difference, ours to the paper's"]
    rows = []
    for row in table.rows:
        found = differences(table, row, counts)
        # Where shares are compared, the FLOPs themselves are of something else.
        unlike = not found or not row.flops or table.share or any(abs(value) > TOLERANCE for value in found.values())
        if bool(unlike) != (row.reason is not None):
            raise ValueError(f"table {table.number}, {' '.join(row.labels)}: differs by {found}, reason {row.reason}")
        ours = counts(row.model) if row.model else None
        cells = [*row.labels, MODELS[row.model][0] if ours else "-", _cell(row.paper[0])]
        cells += [f"{ours.parameters / 1e6:.2f}" if ours else "-", _cell(row.paper[1])]
        counted = ours if row.flops else None
        cells += [f"{counted.flops(a) / scale:.{digits}f}" if counted else "-" for a in (False, True)]
        if table.share:
            cells += [
                f"{100 * row.paper[1] / table.share:.1f}"
                if row.paper[1] and row.labels[-1].startswith("ALBEF")
                else "-"
            ]
            cells += [f"{_share(table, counted, counts):.1f}" if counted else "-"]
        cells += map(_cell, row.accuracy)
        mark = ", ".join(f"{name} {_percent(value)}" for name, value in found.items()) or "not built"
        rows.append([*cells, f"**{mark}** [{numbers[row.reason]}]" if row.reason else mark])
    return [f"## Table {table.number}: {table.title}", "", *_grid(header, rows)]


INTRODUCTION = f"""# The PELA paper's tables, and what this project builds

Made by `{COMMAND}`; a test fails when it is out of date.

- **paper** is what the paper prints. Accuracies, memory and times are the paper's alone: **no model was trained on
  ImageNet, ADE20K, COCO or image-text data by this project.**
- **ours** is counted from what the column "built from" names: a config of this project, or a model of a library.
  FLOPs are two for each multiply-add of convolutions and Linears. The paper does not say what it counts; this is what
  its figures agree with. The products inside attention, of activations with activations, come on top in the next
  column.
- The last column has the difference, in per cent of the paper's figure; one above {100 * TOLERANCE:.0f} %, and a row
  that is not built, have a number with the reason.
"""


class _Figures:
    """M parameters and GFLOPs of a count, for the texts."""

    def __init__(self, ours: Count) -> None:
        self.M, self.G = ours.parameters / 1e6, ours.flops() / 1e9


def _with_classifier(counts: Counts) -> str:
    """M parameters of the segmentors on ViTs with a classifier of 1000 classes more."""
    widths = {"seg-deit": 768, "seg-deit-pela": 768, "seg-deit3": 1024, "seg-deit3-pela": 1024}
    return ", ".join(f"{(counts(key).parameters + 1000 * (d + 1)) / 1e6:.1f}" for key, d in widths.items())


def markdown(counts: Counts) -> str:
    """All tables, with our counts beside the paper's.

    Raises:
        UserError: a package that the tables need is not installed.
        ValueError: a row that differs without a reason, or has a reason without differing.
    """
    if missing := missing_packages():
        raise UserError(f"--paper pela needs {missing[0]}, which is not installed; requirements.txt has its version")
    numbers = {key: number for number, key in enumerate(REASONS, start=1)}
    figures: dict[str, object] = dict(n=numbers, words=WORDS, ade=ADE20K, coco=COCO)
    figures["with_classifier"] = _with_classifier(counts)
    figures |= {key.replace("-", "_"): _Figures(counts(key)) for key, (name, _) in MODELS.items() if not name}
    lines = [INTRODUCTION]
    for table in TABLES:
        lines += _table(table, counts, numbers)
        lines += [table.note.format(**figures), ""] if table.note else []
    for title, header, rows, note in UNCOUNTED:
        lines += [f"## {title}", "", *_grid(header, rows), note, ""]
    lines += ["## Why rows differ, or are not built", ""]
    return "\n".join([*lines, *(f"[{numbers[key]}] {text.format(**figures)}\n" for key, text in REASONS.items())])
