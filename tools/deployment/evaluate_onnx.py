"""AP, size and time of files that export_onnx.py wrote, side by side.

The metric is the config's, on its test data set. Each picture is resized to the files' W x H, whatever its proportions.
Times are onnxruntime's on the CPU, of opening a file and of a picture without reading it: medians over rounds in which
the files take turns. "of the first" is the median ratio within a round.
"""

import argparse
from pathlib import Path

from mmengine.config import DictAction


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config that the files were exported with")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.onnx", help="exported files, of one input size")
    parser.add_argument("--size", metavar="WxH", help="for files of any size: the size to use, multiples of 32")
    parser.add_argument("--rounds", type=int, default=5, help="of the times (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=20, help="of the times (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: its own choice)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override the config")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import contextlib
import io
from collections.abc import Callable
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from rich.table import Table
from torch.utils.data import DataLoader

from mmdet_lors.analysis.arguments import width_and_height
from mmdet_lors.analysis.output import console
from mmdet_lors.analysis.timing import hardware, interleaved, ratio, seconds
from mmdet_lors.conversion.export import OUTPUTS, check_installed
from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.engine.config_check import check_config
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError, first_line

PREPARE = DetDataPreprocessor(bgr_to_rgb=True)
Session = Any
"""An onnxruntime.InferenceSession; onnxruntime is imported only when it is needed."""


def open_file(path: Path, threads: int) -> Session:
    """A file, ready to run.

    Raises:
        UserError: onnxruntime cannot open it, or export_onnx.py did not write it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise UserError(f"{path} cannot be opened: {first_line(error)}") from error
    if [x.name for x in session.get_inputs()] != ["images"] or [x.name for x in session.get_outputs()] != OUTPUTS:
        raise UserError(f"{path} was not written by export_onnx.py: its input must be images, its outputs {OUTPUTS}")
    return session


def input_size(sessions: dict[Path, Session], given: str | None) -> tuple[int, int]:
    """Width and height of the input of all files.

    Raises:
        UserError: they differ, or all files take any size and ``given`` says none.
    """
    size = given and width_and_height("--size", given, multiple=32)
    for path, session in sessions.items():
        height, width = session.get_inputs()[0].shape[2:]
        if isinstance(width, int):
            size = size or (width, height)
            if size != (width, height):
                raise UserError(f"{path} takes {width}x{height}, not {size[0]}x{size[1]}")
    if not size:
        raise UserError("--size WxH is needed: the files take any size")
    return size


def resize_to(size: tuple[int, int], cfg: Config) -> None:
    """Change the test pipeline so that a picture becomes ``size``, and comes alone.

    Raises:
        UserError: the pipeline does not resize pictures in one step.
    """
    steps = cfg.test_dataloader.dataset.pipeline
    resizing = [i for i, step in enumerate(steps) if type_name(step["type"]) == "Resize"]
    if len(resizing) != 1:
        raise UserError(
            "test_dataloader.dataset.pipeline must have one Resize step, which this tool sets to the files' size"
        )
    steps[resizing[0]] = dict(type="Resize", scale=size, keep_ratio=False)
    cfg.test_dataloader.batch_size = 1


def detect(session: Session, images: torch.Tensor) -> list[np.ndarray]:
    """Boxes, scores and labels of one picture, (1, 3, H, W), repeated if the file has a fixed batch."""
    batch = session.get_inputs()[0].shape[0]
    batch = batch if isinstance(batch, int) else 1
    return [found[0] for found in session.run(OUTPUTS, {"images": images.numpy().repeat(batch, axis=0)})]


def with_detections(sample: DetDataSample, found: list[np.ndarray]) -> DetDataSample:
    """A picture's data sample with what was found in it, in pixels of the picture as it was read."""
    boxes, scores, labels = map(torch.from_numpy, found)
    boxes = boxes / boxes.new_tensor(sample.scale_factor).repeat(2)
    sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=labels)
    return sample


def evaluate(sessions: dict[Path, Session], loader: DataLoader, evaluator: dict | list) -> dict[Path, dict]:
    """The metrics of each file, by its path."""
    evaluators = {path: Evaluator(evaluator) for path in sessions}
    for batch in loader:
        data = PREPARE(batch)
        for path, session in sessions.items():
            evaluators[path].dataset_meta = loader.dataset.metainfo
            sample = with_detections(data["data_samples"][0], detect(session, data["inputs"]))
            evaluators[path].process(data_samples=[sample])
    with contextlib.redirect_stdout(io.StringIO()):
        return {path: one.evaluate(len(loader.dataset)) for path, one in evaluators.items()}


def detect_all(session: Session, pictures: list[torch.Tensor]) -> None:
    """Run a file on pictures, one after the other."""
    for images in pictures:
        detect(session, images)


def in_turns(calls: dict[Path, Callable], rounds: int) -> dict[Path, list[float]]:
    """Seconds of each call in each round."""
    return interleaved({path: partial(seconds, call, "cpu") for path, call in calls.items()}, rounds)


def main() -> None:
    """Evaluate and time all files, and print them as a table."""
    args = parse_args()
    if min(args.rounds, args.pictures) < 1 or args.threads < 0:
        raise UserError("--rounds and --pictures must be 1 or more, --threads 0 or more")
    check_installed("onnxruntime")
    cfg = load_config(args.config, args.cfg_options)
    sessions = {path: open_file(path, args.threads) for path in args.files}
    resize_to(input_size(sessions, args.size), cfg)
    check_config(cfg, ("test",))
    check_inputs(cfg, ("test",))

    MMLogger.get_current_instance().setLevel("WARNING")
    loader = Runner.build_dataloader(cfg.test_dataloader)
    metrics = evaluate(sessions, loader, cfg.test_evaluator)
    opening = {path: partial(open_file, path, args.threads) for path in sessions}
    pictures = [PREPARE(batch)["inputs"] for batch in islice(loader, args.pictures)]
    running = {path: partial(detect_all, session, pictures) for path, session in sessions.items()}
    times = [in_turns(opening, args.rounds), in_turns(running, args.rounds)]

    names = list(metrics[args.files[0]])[:2]
    table = Table("file", title=f"{len(loader.dataset)} pictures, {hardware('cpu')}")
    for name in ("MB", *names, "open, ms", "of the first", "ms / picture", "of the first"):
        table.add_column(name, justify="right")
    for path in sessions:
        row = [f"{path.stat().st_size / 1e6:.2f}", *(f"{metrics[path][name]:.3f}" for name in names)]
        for found, count in zip(times, (1, len(pictures)), strict=True):
            row += [f"{1000 * median(found[path]) / count:.1f}", f"{ratio(found, path, args.files[0]):.2f}"]
        table.add_row(path.name, *row)
    console().print(table)


if __name__ == "__main__":
    run(main)
