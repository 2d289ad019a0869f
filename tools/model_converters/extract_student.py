"""Extract the student of PELA's intermediate pre-training: the compressed model, for fine-tuning or serving.

SRC is a checkpoint of PELADistiller. DST has the weight names of the compressed classifier (model.type PELAModel);
ViTPyramid finds its ViT in it. mmdet's SwinTransformer with convert_weights=True reads what --mmdet-swin writes.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", help="checkpoint of the distillation")
    parser.add_argument("dst", type=Path, help="checkpoint to write")
    parser.add_argument(
        "--mmdet-swin", action="store_true", help="name a Swin's weights as mmdet's SwinTransformer expects"
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from torch import Tensor

from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.engine.checkpoint.reading import read_checkpoint, write_checkpoint
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

STUDENT, PATCHES = "student.", "patch_embed.proj.weight"


def extract(checkpoint: Mapping, path: str) -> dict[str, Tensor]:
    """The student's weights, under their own names.

    Raises:
        UserError: the checkpoint does not hold a student.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    student = {key.removeprefix(STUDENT): value for key, value in weights.items() if key.startswith(STUDENT)}
    if not student:
        raise UserError(f"checkpoint {path} holds no student: it is not a checkpoint of a PELADistiller")
    return student


def original_swin_names(student: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """A timm Swin's weights, except the classifier, under its authors' names, which mmdet converts to its own.

    timm makes a downsampling part of the stage after it, the authors of the stage before it.

    Raises:
        UserError: the student is not a Swin, or its downsampling, whose input channels mmdet reorders, is factorised.
    """
    prefix = next((key.removesuffix(PATCHES) for key in student if key.endswith(PATCHES)), None)
    weights = {
        key.removeprefix(prefix): v for key, v in student.items() if prefix is not None and key.startswith(prefix)
    }
    if not any(re.match(r"layers\.\d+\.blocks\.", key) for key in weights):
        raise UserError(f"--mmdet-swin: the student in {path} is not a Swin of timm")
    if any(key.endswith("downsample.reduction.U") for key in weights):
        raise UserError("--mmdet-swin: the student's downsample layers are compressed; 'downsample' must be in omit")
    return {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key): value
        for key, value in weights.items()
        if not key.startswith("head.")
    }


def main() -> None:
    """Read the checkpoint, extract the student, write it."""
    args = parse_args()
    check_writable("DST", args.dst, formats=())
    checkpoint = read_checkpoint(args.src)
    student = extract(checkpoint, args.src)
    if args.mmdet_swin:
        student = original_swin_names(student, args.src)
    meta = checkpoint.get("meta", {})
    meta = {key: meta[key] for key in ("dataset_meta",) if key in meta}
    write_checkpoint(dict(meta=meta, state_dict=student), args.dst)
    print(f"wrote {args.dst}: {len(student)} weights, {sum(v.numel() for v in student.values()):,} values")


if __name__ == "__main__":
    run(main)
