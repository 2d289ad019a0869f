"""The golden files of tests/data: numbers of the reference implementations, and our detectors with their weights."""

from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData
from torch import nn

from mmdet_lors.conversion.reference import convert

TESTS = Path(__file__).parent
DATA = TESTS / "data"
NAMES = ["adamixer", "lors"]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def model_config(golden: dict) -> ConfigDict:
    """The base model's config at the golden file's sizes, on a backbone whose levels the recorded neck had."""
    p = golden["params"]
    lors = None
    if "roi_head.adaptive_mixing.base_out_proj.weight" in golden["state_dict"]:
        lors = dict(
            adaptive=dict(rank=golden["kernel_sizes"], groups=golden["kernel_groups"]),
            static=dict(rank=golden["ranks"]),
        )
    cfg = Config.fromfile(TESTS.parent / "configs/_base_/models/adamixer_r50.py")
    changes = dict(
        backbone=dict(depth=18, init_cfg=None),
        neck=dict(in_channels=[64, 128, 256, 512], out_channels=p["C"]),
        query_generator=dict(num_queries=p["N"], content_dim=p["C"]),
        decoder=dict(
            num_stages=p["num_stages"],
            num_classes=p["ncls"],
            featmap_strides=golden["featmap_strides"],
            stage=dict(
                content_dim=p["C"],
                feat_channels=p["C"],
                num_heads=p["heads"],
                ffn_channels=p["ffn"],
                num_groups=p["groups"],
                in_points=p["pin"],
                out_points=p["pout"],
            ),
            lors=lors,
        ),
        test_cfg=dict(max_per_img=p["N"]),
    )
    cfg.merge_from_dict(dict(model=changes))
    return cfg.model


def load(name: str) -> tuple[dict, nn.Module]:
    """A golden file, and the detector in float64 with its weights; backbone and neck are not in the file."""
    golden = torch.load(DATA / f"{name}_decoder.pt")
    model = MODELS.build(model_config(golden)).double()
    weights = convert(golden["state_dict"], golden["params"]["groups"])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.startswith(("backbone.", "neck.")) for key in missing)
    return golden, model


def samples(golden: dict) -> list[DetDataSample]:
    out = []
    for size, boxes, labels in zip(golden["image_sizes"], golden["gt_bboxes"], golden["gt_labels"], strict=True):
        sample = DetDataSample(metainfo=dict(img_shape=tuple(size), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        out.append(sample)
    return out
