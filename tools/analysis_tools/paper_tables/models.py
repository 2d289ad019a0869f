"""The cost of the models in the papers' tables: each function builds one without weights and returns its figures."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from mmdet_lors.analysis.complexity import OperationCounter, encoder_parameters, measure
from mmdet_lors.conversion.folding import folded_config
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.lors import LORSA, LORST
from mmdet_lors.pela import compress
from mmdet_lors.pela.distiller import merged

CONFIGS = Path(__file__).parents[3] / "configs"
DEIT = "classification/deit-tiny_cifar100"
Figures = dict[str, float]


def read(config: str, changes: dict | None = None, whole: bool = False, lora: int | None = None) -> dict:
    """The model of a config below configs/, or of a package if its name has '::', with these fields changed.

    Args:
        config: its name; without '.py' if below configs/.
        changes: fields of the model.
        whole: with the uncompressed backbone in place of the compressed one.
        lora: rank of LoRA on every Linear of the uncompressed backbone's blocks.
    """
    model = (get_config(config) if "::" in config else Config.fromfile(CONFIGS / f"{config}.py")).model
    if whole or lora:
        model = dict(model, backbone=model["backbone"]["backbone"])
    if lora:
        model["backbone"] = dict(type="mmdet.WithLoRA", model=model["backbone"], targets=["*blocks.*"], rank=lora)
    return merged(model, changes or {})


def detector(config: str, size=(1280, 800), changes: dict | None = None, folded: bool = False) -> Figures:
    """An AdaMixer's figures at (W, H) pixels; ``folded``: as it is served."""
    model = read(config, changes)
    report = measure(folded_config(model) if folded else model, size)
    found = {
        "decoder parameters, M": report.decoder.parameters / 1e6,
        "parameters, M": report.total.parameters / 1e6,
        "decoder GFLOPs": report.decoder.multiply_adds / 1e9,
        "products": report.decoder.products / 1e9,
        "backbone and neck": sum(part.multiply_adds for part in report.parts.values()) / 1e9,
        "GFLOPs": report.total.multiply_adds / 1e9,
    }
    for label, cost in report.components.items():
        found |= {label: cost.multiply_adds / 1e9, f"{label}, M": cost.parameters / 1e6}
    return found | {"LORST, M": sum(found.get(f"LORST {half}, M", 0) for half in ("shared", "private"))}


def parameters(config: str, changes: dict | None = None) -> Figures:
    """An AdaMixer's figures without running it, which is faster."""
    return detector(config, None, changes)


def layer(kind: str, rank: int) -> Figures:
    """One of six layers, without biases: LORST's W_out 32768 -> 256; LORSA's W_S 128 x 64 with K = 2."""
    if kind == "LORST":
        module, plain = LORST(32768, 256, num_layers=6, rank=rank, bias=False), 32768 * 256
    else:
        module, plain = LORSA(256, [(128, 64)], 1, num_layers=6, rank=rank, groups=2), 256 * 128 * 64
    counted = sum(p.numel() for name, p in module.named_parameters() if not name.endswith("bias")) / 6
    return {"M per layer": counted / 1e6, "per cent": 100 * counted / plain}


@cache
def encoder(config: str) -> Figures:
    """Parameters of a vision transformer's layers, and as a percentage of the plain one's."""
    counted = encoder_parameters(read(config))
    percent = 100 * counted / encoder(DEIT)["encoder parameters"] if config != DEIT else 100.0
    return {"encoder parameters": counted, "per cent": percent, "saved": 100 - percent}


class _ProductCounter(OperationCounter):
    """Also counts attention's products of activations, to separate them from products with weights."""

    attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.attention += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
        return out


def count(model: nn.Module, forward, unit: str = "GFLOPs") -> Figures:
    """Parameters of a model on the meta device, and two FLOPs for each product in ``forward``, which runs it."""
    model.eval()
    # Enabling gradients turns off PyTorch's fused inference path for attention, which hides its operations.
    with _ProductCounter(model).named() as counter, torch.enable_grad():
        forward()
    flops, scale = 2 * sum(counter.products.values()), {"GFLOPs": 1e9, "TFLOPs": 1e12}[unit]
    found = {"parameters, M": sum(p.numel() for p in model.parameters()) / 1e6}
    return found | {unit: (flops - 2 * counter.attention) / scale, "with attention's products": flops / scale}


def _image(width: int, height: int) -> Tensor:
    return torch.empty(1, 3, height, width, device="meta")


def classifier(name: str, size: int = 224, **settings) -> Figures:
    """A timm model."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    return count(model, lambda: model(_image(size, size)))


def student(config: str) -> Figures:
    """The network that a PELADistiller trains."""
    network = build_without_weights(read(config)).student.network
    return count(network, lambda: network(_image(224, 224)))


def segmentor(config: str, size=(683, 512), windows: int = 1, **reading) -> Figures:
    """mmsegmentation's EncoderDecoder on a whole image, or on windows of that size; its auxiliary head does not run."""
    import mmseg.models  # noqa: F401

    with DefaultScope.overwrite_default_scope("mmseg"):
        model = build_without_weights(dict(read(config, **reading), type="mmseg.EncoderDecoder"))

    def forward() -> None:
        for _ in range(windows):
            maps = model.backbone(_image(*size))
            model.decode_head(model.neck(maps) if model.with_neck else maps)

    found, width = count(model, forward), model.decode_head.in_channels[-1]
    return found | {"with ImageNet's classifier, M": found["parameters, M"] + 1000 * (width + 1) / 1e6}


def cascade(config: str, masks: bool = False, **reading) -> Figures:
    """Cascade Mask R-CNN: backbone, neck, RPN, box heads on 1000 proposals; ``masks``: mask heads on 100 as well."""
    model = build_without_weights(read(config, **reading))

    def forward() -> None:
        model.rpn_head(model.neck(model.backbone(_image(1088, 800))))
        for head in model.roi_head.bbox_head:
            head(torch.empty(1000, 256, 7, 7, device="meta"))
        for head in model.roi_head.mask_head if masks else ():
            head(torch.empty(100, 256, 14, 14, device="meta"))

    return count(model, forward)


@cache
def albef(task: str, ratio: float | None = None) -> Figures:
    """ALBEF (arXiv:2107.07651) for "retrieval" or "answers": weights in training, one pass of an image and 30 words.

    A ViT-B/16 for the image; BERT-base for the text, whose last 6 layers also attend to the image; for answers 6 more
    such layers, which write them. All but the matching head exists twice, the second time as a moving average.
    """
    from transformers import BertConfig, BertLMHeadModel, ViTConfig, ViTModel

    def bert(layers: int) -> nn.Module:
        return BertLMHeadModel(BertConfig(num_hidden_layers=layers, is_decoder=True, add_cross_attention=True))

    with torch.device("meta"):
        image, text = ViTModel(ViTConfig(image_size=384), add_pooling_layer=False), bert(12).bert
        for block in text.encoder.layer[:6]:
            del block.crossattention
        if task == "answers":
            heads, single = bert(6), nn.Module()
        else:
            heads, single = nn.ModuleList([nn.Linear(768, 256), nn.Linear(768, 256)]), nn.Linear(768, 2)
            single.temperature = nn.Parameter(torch.empty(()))
        tokens = torch.zeros(1, 30, dtype=torch.long)
    online = nn.ModuleList([image, text, heads])
    if ratio:
        compress(online, ratio, ("decoder",), approximate=False, inplace=True)

    def states(model: nn.Module, seen: Tensor) -> Tensor:
        x = model.embeddings(tokens)
        for block in model.encoder.layer:
            x = block(x, None, seen if hasattr(block, "crossattention") else None)
        return x

    def forward() -> None:
        x = states(text, image(_image(384, 384)).last_hidden_state)
        heads.cls(states(heads.bert, x)) if task == "answers" else single(x[:, 0])

    found = count(nn.ModuleList([online, deepcopy(online), single]), forward, "TFLOPs")
    base = albef(task)["TFLOPs"] if ratio else found["TFLOPs"]
    return found | {"per cent of Base's": 100 * found["TFLOPs"] / base}


def answerer(name: str, **settings) -> Figures:
    """Parameters of a question-answering model of transformers."""
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**settings)
        model = getattr(transformers, f"{name}ForQuestionAnswering")(config)
    return {"parameters, M": sum(p.numel() for p in model.parameters()) / 1e6}
