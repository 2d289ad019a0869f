"""Write a trained AdaMixer or DETR, plain or with LORS, as one ONNX file, and check that file against PyTorch.

An AdaMixer's LORS is folded first, so that the file holds the equivalent plain AdaMixer, or with --factored when
onnxruntime opens the file, which is then as small as the checkpoint's weights. The file maps

  images  float32 (B, 3, H, W)   RGB, 0 to 255; the config's normalisation is inside
  boxes   float32 (B, k, 4)      x1, y1, x2, y2 in input pixels
  scores  float32 (B, k)         best first
  labels  int64   (B, k)         k = test_cfg.max_per_img; over queries x classes, no NMS

Every image is taken to fill the whole input: resize it to W x H. The batch is dynamic, the size only with
--dynamic-size; both are fixed for a DETR. With --precision fp16, convolutions and products compute in float16, the
arithmetic of boxes does not; with int8, they have 8-bit weights and inputs.
"""

import argparse
import logging
import os
import warnings
from copy import deepcopy
from itertools import cycle, islice, product
from pathlib import Path

OPSET = 18
"""The version that PyTorch's exporter writes; later ones are converted from it."""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of the detector, with or without LORS")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT.onnx", help="file to write")
    parser.add_argument(
        "--size", default="1280x800", metavar="WxH", help="input size, multiples of 32 (default: %(default)s)"
    )
    parser.add_argument(
        "--dynamic-size", action="store_true", help="take any size of multiples of 32; --size is what the check uses"
    )
    parser.add_argument(
        "--fixed-batch", type=int, metavar="B", help="fix the batch size, for runtimes that need it fixed"
    )
    parser.add_argument(
        "--factored",
        action="store_true",
        help="keep LORS's A, B, E and shared weights; onnxruntime folds them on opening",
    )
    parser.add_argument(
        "--precision", choices=["fp32", "fp16", "int8"], default="fp32", help="of weights (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", metavar="FOLDER", help="with int8: pictures that show which ranges its inputs have"
    )
    parser.add_argument("--opset", type=int, default=OPSET, help="version of ONNX's operators (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import numpy as np
import torch
from mmdet.models.detectors import DetectionTransformer
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor

from mmdet_lors.analysis.arguments import check_writable, width_and_height
from mmdet_lors.conversion.export import OUTPUTS, TensorDetector, TensorDETR, any_batch, check_installed
from mmdet_lors.conversion.folding import folded_config, folded_state_dict
from mmdet_lors.conversion.onnx_precision import picture, to_fp16, to_int8
from mmdet_lors.engine.checkpoint.config_and_weights import read_weights, uncompressed
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError, first_line
from mmdet_lors.inference.sources import images_in

STRIDE = 32
"""Both sides of the input must be multiples of this, the largest stride of a backbone."""
TOLERANCES = dict(fp32=1e-3, fp16=2e-2, int8=1e30)
"""Largest difference of scores, and of boxes as a share of the input's longer side; any that is finite for int8."""


def build(cfg: Config, checkpoint: str, factored: bool) -> tuple[TensorDetector, TensorDetector]:
    """The trained detector itself, for comparison, and the one to export.

    An AdaMixer is folded, and samples by grid_sample; ``factored``: folded by its own operations, on nothing but
    parameters, at the start of every pass.

    Raises:
        UserError: a checkpoint that cannot be read or does not fit, ``factored`` without an AdaMixer's LORS, or
            neither an AdaMixer nor one of mmdet's DETRs.
    """
    model_cfg = cfg.model
    adamixer = uncompressed(model_cfg)
    if "stage" not in (adamixer.get("decoder") or {}):
        return build_detr(cfg, checkpoint, factored)
    adamixer.decoder.update(sampling="auto", compile=False)
    trained = MODELS.build(model_cfg)
    weights, _ = read_weights(checkpoint, trained)
    trained.load_state_dict(weights)
    plain_cfg = folded_config(model_cfg)
    if factored and plain_cfg is None:
        raise UserError("--factored: model.decoder.lors is not set: there are no factors")
    if factored:
        exported = deepcopy(trained)
        for half in (exported.decoder.lorsa, exported.decoder.lorst):
            if half is not None:
                half.path = "fold"
    else:
        exported = MODELS.build(plain_cfg or model_cfg)
        exported.load_state_dict(folded_state_dict(trained))
    exported.decoder.sampling = "grid_sample"
    preprocessor = adamixer.get("data_preprocessor") or {}
    return TensorDetector(trained, preprocessor).eval(), TensorDetector(exported, preprocessor).eval()


def build_detr(cfg: Config, checkpoint: str, factored: bool) -> tuple[TensorDetector, TensorDetector]:
    """As :func:`build`; the file computes the weights that a stack shares as the model does."""
    detr = MODELS.build(cfg.model)
    if not isinstance(detr, DetectionTransformer):
        raise UserError(f"config {cfg.filename}: only an AdaMixer or a DETR can be exported, not {type(detr).__name__}")
    if factored:
        raise UserError("--factored: for an AdaMixer; what a DETR's layers share is never folded")
    weights, _ = read_weights(checkpoint, detr)
    detr.load_state_dict(weights)
    preprocessor = cfg.model
    while "model" in preprocessor:  # WithLORS, PELAModel
        preprocessor = preprocessor["model"]
    model = TensorDETR(detr, preprocessor.get("data_preprocessor") or {}).eval()
    return model, model


def trace(model: TensorDETR, path: Path, images: Tensor, opset: int) -> None:
    """Write what mmdet's code does with images of one batch and size: torch.export cannot follow it.

    Raises:
        UserError: something in the model has no ONNX counterpart, or none in this opset.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=False,
                input_names=["images"],
                output_names=OUTPUTS,
                opset_version=opset,
            )
    except (torch.onnx.errors.OnnxExporterError, ValueError) as error:
        raise UserError(f"this model cannot be exported to opset {opset}: {first_line(error)}") from error


def export(
    model: TensorDetector, path: Path, size: tuple[int, int], dynamic_size: bool, batch: int | None, opset: int
) -> None:
    """Trace the model and write it; ``batch`` None leaves the batch dynamic.

    Raises:
        UserError: something in the model has no ONNX counterpart, or none in this opset.
    """
    # One size stands for all: sides that are larger than one cell, and that Swin has to pad to whole windows.
    width, height = (11 * STRIDE, 5 * STRIDE) if dynamic_size else size
    images = torch.zeros(batch or 2, 3, height, width)
    dims = {} if batch else {0: torch.export.Dim("batch")}
    if dynamic_size:
        dims |= {2: STRIDE * torch.export.Dim("height"), 3: STRIDE * torch.export.Dim("width")}
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    try:
        with torch.no_grad(), any_batch(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=OUTPUTS,
                dynamic_shapes={"images": dims},
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        where = " with --dynamic-size" if dynamic_size else ""
        raise UserError(f"this model cannot be exported to opset {opset}{where}: {reason}") from error
    if program.model.opset_imports[""] != opset:
        raise UserError(f"--opset {opset}: this model cannot be converted to it; {OPSET} works")
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces: a megabyte, with this machine's paths
    program.save(path, external_data=False)


def convert(path: Path, precision: str, pictures: list[str], size: tuple[int, int], batch: int) -> None:
    """Rewrite a file of float32 in another precision.

    Raises:
        UserError: onnxruntime cannot do it, or a picture cannot be read.
    """
    try:
        if precision == "fp16":
            to_fp16(path)
        elif precision == "int8":
            to_int8(path, (picture(p, size).repeat(batch, axis=0) for p in pictures))
    except UserError:
        raise
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise UserError(
            f"--precision {precision}: onnxruntime cannot convert this model: {first_line(error)}"
        ) from error


def inputs(batch: int, size: tuple[int, int], pictures: list[str]) -> Tensor:
    """Images to compare on, (B, 3, H, W): the first of the pictures, or noise if there are none."""
    if pictures:
        return torch.from_numpy(np.concatenate([picture(p, size) for p in islice(cycle(pictures), batch)]))
    return torch.rand(batch, 3, *size[::-1], generator=torch.Generator().manual_seed(0)) * 255


def check(path: Path, model: TensorDetector, images: Tensor, tolerance: float) -> tuple[float, float]:
    """Run a file in onnxruntime and compare it with PyTorch.

    The scores must agree in order. A box may trade places with one of nearly the same score, so each is compared with
    all of PyTorch's boxes that have its label and score, over all queries.

    Returns:
        The largest difference of scores, and of boxes in pixels.

    Raises:
        UserError: a file that onnxruntime cannot run, or a difference above the tolerance.
    """
    import onnxruntime

    batch, _, height, width = images.shape
    place = f"batch {batch} of {width}x{height}"
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(OUTPUTS, {"images": images.numpy()})
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise UserError(f"onnxruntime cannot run the export at {place}: {first_line(error)}") from error
    boxes, scores, labels = map(torch.from_numpy, found)
    kept, model.max_per_img = model.max_per_img, model.pairs
    try:
        with torch.no_grad():
            expected = model(images)
    finally:
        model.max_per_img = kept
    k = min(kept, expected[1].shape[1])
    if scores.shape != (batch, k):
        raise UserError(f"the export differs from PyTorch: scores of shape {tuple(scores.shape)} at {place}")
    by_score = (scores - expected[1][:, :k]).abs().max().item()
    detections = zip(zip(boxes, scores, labels, strict=True), zip(*expected, strict=True), strict=True)
    by_box = max(_box_difference(*pair, tolerance) for pair in detections)
    if not (by_score <= tolerance and by_box <= tolerance * max(width, height)):
        raise UserError(
            f"the export differs from PyTorch at {place}: scores by {by_score:.2g}, boxes by {by_box:.2g} pixels"
        )
    return by_score, by_box


def _box_difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> float:
    """Largest distance from a box of one image to the nearest one of its label and score; inf if there is none."""
    boxes, scores, labels = found
    all_boxes, all_scores, all_labels = expected
    distance = torch.cdist(boxes, all_boxes, p=torch.inf)
    same = (labels[:, None] == all_labels) & ((scores[:, None] - all_scores).abs() <= tolerance)
    return distance.masked_fill(~same, torch.inf).amin(dim=1).max().item()


def main() -> None:
    """Check the arguments, export beside OUT, compare, and only then rename to OUT."""
    args = parse_args()
    size = width_and_height("--size", args.size, multiple=STRIDE)
    if args.fixed_batch is not None and args.fixed_batch < 1:
        raise UserError(f"--fixed-batch {args.fixed_batch} must be 1 or more")
    if args.opset < OPSET:
        raise UserError(f"--opset {args.opset} must be {OPSET} or more")
    if args.precision == "int8" and args.factored:
        raise UserError("--precision int8: LORS's factors cannot be int8; leave out --factored, or take fp16")
    if (args.precision == "int8") != (args.calibration is not None):
        raise UserError("--precision int8 needs --calibration FOLDER, and no other precision takes it")
    check_writable("OUT", args.out, (".onnx",))
    check_installed("onnx", "onnxscript", "onnxruntime")
    pictures = images_in(args.calibration) if args.calibration else []

    trained, exported = build(load_config(args.config), args.checkpoint, args.factored)
    is_detr = isinstance(exported, TensorDETR)
    if is_detr and (args.dynamic_size or not args.fixed_batch):
        raise UserError("a DETR is exported for one batch and size: give --fixed-batch, and no --dynamic-size")
    unfinished = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    try:
        if is_detr:
            trace(exported, unfinished, inputs(args.fixed_batch, size, []), args.opset)
        else:
            export(exported, unfinished, size, args.dynamic_size, args.fixed_batch, args.opset)
        convert(unfinished, args.precision, pictures, size, args.fixed_batch or 1)
        sizes = [size, size[::-1], (STRIDE, STRIDE)] if args.dynamic_size else [size]
        for batch, (w, h) in product([args.fixed_batch] if args.fixed_batch else [1, 3], sizes):
            images = inputs(batch, (w, h), pictures)
            by_score, by_box = check(unfinished, trained, images, TOLERANCES[args.precision])
            found = f"scores within {by_score:.1e}"
            found += ", held to no limit" if args.precision == "int8" else f", boxes within {by_box:.1e} pixels"
            print(f"onnxruntime at batch {batch} of {w}x{h}: {found}")
        unfinished.replace(args.out)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
