"""Convert a checkpoint of the reference AdaMixer or LORS (mmdet 2.x) into one of ours."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

COCO_CLASSES = 80


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of the reference AdaMixer or LORS (mmdet 2.x) into one of ours. Its weights "
        "tell which of the two it is, and its sizes."
    )
    parser.add_argument("src", metavar="SRC", type=Path, help="the reference's checkpoint, or its bare state dict")
    parser.add_argument("dst", metavar="DST", type=Path, help="checkpoint to write; replaced if it exists")
    parser.add_argument("--config", help="refuse a checkpoint whose weights are not exactly those of this config")
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help=f"number of classes that the checkpoint must have (default: the config's, or COCO's {COCO_CLASSES})",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import Tensor, nn

from mmdet_lors.analysis.complexity import build_on_meta
from mmdet_lors.conversion.reference import DROPPED, convert, settings
from mmdet_lors.engine.checkpoint.config_and_weights import read_config
from mmdet_lors.engine.checkpoint.reading import check_fit, read_checkpoint, write_checkpoint
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError, first_line

WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)
"""The reference's initial positions: centre and size of the image, in units of its size."""


def read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a checkpoint, and the names of everything else in it.

    Raises:
        UserError: the file cannot be read safely, has no weights, or has weights that are not finite.
    """
    try:
        checkpoint = read_checkpoint(path, mmap=True)
    except UserError as error:
        if isinstance(error.__cause__, UnpicklingError) and "Unsupported" in str(error.__cause__):
            raise UserError(
                f"checkpoint {path} holds Python objects that are not safe to load; if you trust it, keep only its "
                "weights: torch.save(torch.load(SRC, weights_only=False)['state_dict'], NEW)"
            ) from error
        raise
    weights, dropped = checkpoint, []
    if isinstance(checkpoint.get("state_dict"), Mapping):
        weights, dropped = checkpoint["state_dict"], [key for key in checkpoint if key != "state_dict"]
    weights = {str(key).removeprefix("module."): value for key, value in weights.items()}
    if not weights:
        raise UserError(f"checkpoint {path} holds no weights")
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"checkpoint {path}: {key} is a {type(value).__name__}, not a weight")
        if not torch.isfinite(value).all():
            raise UserError(f"checkpoint {path}: {key} has values that are not finite")
    return weights, dropped


def understand(weights: Mapping[str, Tensor], src: Path) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """The settings of the model that has these weights, see :func:`settings`, and the weights converted to ours.

    Raises:
        UserError: the weights are neither of a reference AdaMixer nor of a reference LORS.
    """
    try:
        found = settings(weights)
        return found, convert(weights, found["decoder"]["stage"]["num_groups"])
    except (UserError, KeyError) as error:
        raise UserError(f"checkpoint {src}: {error.args[0]}") from error
    except RuntimeError as error:
        raise UserError(f"checkpoint {src}: its shapes do not fit together: {first_line(error)}") from error


def model_of(found: Mapping[str, dict]) -> nn.Module:
    """The model of these settings on the meta device, without its backbone."""
    decoder = dict(
        type="AdaMixerDecoder",
        featmap_strides=[1],
        loss_cls=dict(type="FocalLoss", use_sigmoid=True),
        loss_bbox=dict(type="L1Loss"),
        loss_iou=dict(type="GIoULoss"),
        **found["decoder"],
    )
    decoder["stage"] = dict(type="AdaMixerDecoderStage", **decoder["stage"])
    parts = dict(query_generator=dict(type="InitialQueryGenerator", **found["query_generator"]), decoder=decoder)
    if "neck" in found:
        parts["neck"] = dict(type="ChannelMapping", **found["neck"])
    with torch.device("meta"):
        return nn.ModuleDict({name: MODELS.build(part) for name, part in parts.items()})


def check(
    converted: dict[str, Tensor], found: Mapping[str, dict], src: Path, config: str | None, num_classes: int | None
) -> None:
    """Refuse weights that are not exactly those of a whole model.

    Without a config, the backbone is not checked: only its config says which it is.

    Raises:
        UserError: another number of classes, or weights that are missing, left over or of another shape.
    """
    classes = found["decoder"]["num_classes"]
    if num_classes is None and not config:
        num_classes = COCO_CLASSES
    if num_classes not in (None, classes):
        raise UserError(f"checkpoint {src} has {classes} classes, not {num_classes}: use --num-classes {classes}?")
    if config:
        cfg = read_config(config)
        model = build_on_meta(cfg.model)
        if model.decoder.num_classes != classes:
            raise UserError(f"checkpoint {src} has {classes} classes, {config} has {model.decoder.num_classes}")
    else:
        try:
            model = model_of(found)
        except UserError as error:
            raise UserError(f"checkpoint {src}: {error}") from error
        converted = {key: value for key, value in converted.items() if not key.startswith("backbone.")}
    check_fit(model, converted, src)


def compact(value: Tensor) -> Tensor:
    """Copy the values into a storage of their own if they share one: torch.save writes whole storages."""
    value = value.detach().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def per_stage(values: list[int]) -> str:
    """One number for all stages if they agree, else one for each."""
    return str(values[0]) if len(set(values)) == 1 else str(values)


def summary(found: Mapping[str, dict]) -> str:
    """The kind and the sizes of a checkpoint, in one line."""
    decoder, stage = found["decoder"], found["decoder"]["stage"]
    sizes = (
        f"{found['query_generator']['num_queries']} queries, {decoder['num_classes']} classes, "
        f"{decoder['num_stages']} stages, {stage['num_groups']} groups of {stage['in_points']} points"
    )
    if decoder["lors"] is None:
        return f"reference AdaMixer: {sizes}"
    adaptive, static = decoder["lors"]["adaptive"], decoder["lors"]["static"]
    return (
        f"reference LORS: {sizes}, LORSA of rank {per_stage(adaptive['rank'])} and groups "
        f"{per_stage(adaptive['groups'])}, LORST of rank {per_stage(static['rank'])}"
    )


def main() -> None:
    """Read the checkpoint, convert it, check it against the model that its sizes give, and write it."""
    args = parse_args()
    if not args.dst.parent.is_dir():
        raise UserError(f"folder {args.dst.parent} does not exist")
    if args.dst.is_dir() or args.dst.resolve() == args.src.resolve():
        raise UserError(f"{args.dst} is {'a folder' if args.dst.is_dir() else 'the checkpoint to convert'}")
    register_all_modules()
    weights, dropped = read(args.src)
    found, converted = understand(weights, args.src)
    check(converted, found, args.src, args.config, args.num_classes)
    write_checkpoint(dict(state_dict={key: compact(value) for key, value in converted.items()}), args.dst)

    print(f"{args.src} is a {summary(found)}")
    if not any(key.startswith("backbone.") for key in converted):
        print("it has no backbone")
    for key in DROPPED:
        if key in weights:
            dropped.append(key)
            if {tuple(box) for box in weights[key].tolist()} != {WHOLE_IMAGE}:
                print(f"warning: {key} is not {WHOLE_IMAGE}, but our queries start on the whole image")
    print(f"dropped: {', '.join(dropped) or 'nothing'}")
    print(f"{args.dst}: {len(converted)} tensors, {sum(v.numel() for v in converted.values()):,} values")


if __name__ == "__main__":
    run(main)
