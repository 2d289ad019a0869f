"""Compress a trained model to a ratio or a budget, with factors that fit its outputs on its training images.

OUT is the checkpoint of the compressed model; its config, with the rank of every layer, is written beside it as .py.
Both go wherever CONFIG and CHECKPOINT go: test.py, infer.py, and train.py with load_from=OUT to recover. Every
Linear is factorised, and with --convolutions every ungrouped convolution, but those that --omit names. A budget is
spent where the loss on those images says, or without images the weights; docs/compression.md has the equations.
"""

import argparse
from dataclasses import replace
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of the plain model")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="checkpoint to write, .pth")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--ratio", type=float, help="of compression, the same for every layer")
    size.add_argument("--params", metavar="N", help="of the whole compressed model: 30M, 900k or 60%%")
    size.add_argument("--flops", metavar="N", help="multiply-adds of the whole model on its images: 20G or 60%%")
    parser.add_argument("--convolutions", action="store_true", help="factorise convolutions too")
    parser.add_argument(
        "--omit",
        nargs="*",
        metavar="PART",
        help="leave whole what has this in its name (default: norm head patch_embed downsample)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=256,
        help="of its training data, to fit the factors on; 0 fits the weights alone (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdet_lors.analysis.arguments import check_writable, quantity
from mmdet_lors.analysis.study import table
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.config_and_weights import read_weights
from mmdet_lors.engine.checkpoint.reading import write_checkpoint
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError
from mmdet_lors.pela import OMIT, Allocation, CompressedLayer, allocate, compress, second_moments
from mmdet_lors.pela.calibration import Moments
from mmdet_lors.pela.compressed import calibration_batches, total_loss


def budget(args: argparse.Namespace, model: nn.Module, data: dict | None, moments: Moments | None) -> Allocation:
    """The ranks that the options allow."""
    settings = dict(omit=args.omit, convolutions=args.convolutions)
    if args.params:
        whole = sum(p.numel() for p in model.parameters())
        return allocate(model, int(quantity("--params", args.params, whole)), calibration=moments, **settings)
    assert data is not None and moments is not None
    first = next(iter(calibration_batches(data, model)))
    images = len(first["inputs"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**first)
    whole = counter.get_total_flops() / 2 / images
    uses = {name: moment.uses / images for name, moment in second_moments(model, [first], **settings).items()}
    layers = sum(model.get_submodule(name).weight.numel() * n for name, n in uses.items())
    print(f"{whole / 1e9:.3f} G multiply-adds an image, {layers / whole:.0%} of them in layers that can be compressed")
    allowed = quantity("--flops", args.flops, whole)
    if allowed < whole - layers:
        raise UserError(f"--flops {args.flops} is below the {(whole - layers) / 1e9:.3f} G of all other layers")
    moments = {name: replace(moment, uses=uses[name]) for name, moment in moments.items()}
    return allocate(model, multiply_adds=allowed - (whole - layers), calibration=moments, **settings)


def report_of(layers: list[CompressedLayer], allocation: Allocation | None) -> str:
    """What became of each layer, and the weights' error over the budget, as Markdown."""
    header = ["layer", "in", "out", "rank", "parameters", "share", "error of the weight", "of the output"]
    rows = [
        [
            layer.name,
            *(f"{n:,}" for n in (layer.in_features, layer.out_features, layer.rank, layer.parameters_after)),
            f"{layer.parameters_after / layer.parameters_before:.0%}",
            f"{layer.error:.4f}",
            "" if layer.output_error is None else f"{layer.output_error:.4f}",
        ]
        for layer in layers
    ]
    lines = table(header, rows)
    if allocation is not None:
        low, high = (allocation.curve[i][0] for i in (0, -1))
        steps = [low + (high - low) * i / 8 for i in range(9)]
        points = [[point for point in allocation.curve if point[0] <= step][-1] for step in steps]
        curve = [[f"{cost / 1e6:,.3f} M", f"{error:.4f}"] for cost, error in points]
        lines += ["", *table(["budget", "share of the error at rank 0"], curve)]
    return "\n".join(lines)


def compressed_config(cfg: Config, args: argparse.Namespace, ranks: dict[str, int] | None) -> Config:
    """The same with the compressed model."""
    how = dict(ratio=args.ratio) if ranks is None else dict(ranks=ranks)
    model = dict(type="PELAModel", model=cfg.model, omit=args.omit, convolutions=args.convolutions, **how)
    for field in ("work_dir", "load_from", "resume"):
        cfg.pop(field, None)
    cfg.model = model
    return cfg


def main() -> None:
    """Check everything first, then compress, then write."""
    args = parse_args()
    args.omit = list(OMIT) if args.omit is None else args.omit
    check_writable("OUT", args.out, formats=(".pth",))
    if args.images < 0:
        raise UserError(f"--images must be 0 or more, got {args.images}")
    if args.flops and not args.images:
        raise UserError("--flops needs --images, on which the multiply-adds are counted")
    cfg = load_config(args.config)
    weights, meta = read_weights(args.checkpoint, build_without_weights(cfg.model))
    model = MODELS.build(cfg.model).to(args.device).eval()
    model.load_state_dict(weights)
    data = None
    if args.images:
        if not cfg.get("train_dataloader"):
            raise UserError(f"config {args.config} has no train_dataloader, whose images the factors are fitted on")
        data = dict(dataset=cfg.train_dataloader.dataset, images=args.images)

    settings = dict(omit=args.omit, convolutions=args.convolutions)
    torch.manual_seed(0)
    try:
        moments, allocation, ranks = None, None, None
        if data:
            batches = calibration_batches(data, model, "predict" if args.ratio else "loss")
            moments = second_moments(model, batches, loss=None if args.ratio else total_loss, **settings)
        if not args.ratio:
            allocation = budget(args, model, data, moments)
            ranks = allocation.ranks
        small, report = compress(model, args.ratio, ranks=ranks, calibration=moments, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(report_of(report, allocation))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    meta = {key: meta[key] for key in ("dataset_meta",) if key in meta}
    write_checkpoint(dict(meta=meta, state_dict=small.cpu().state_dict()), args.out)
    config = args.out.with_suffix(".py")
    compressed_config(cfg, args, ranks).dump(config)
    print(f"\n{before:,} parameters -> {after:,}; wrote {args.out} and {config}")


if __name__ == "__main__":
    run(main)
