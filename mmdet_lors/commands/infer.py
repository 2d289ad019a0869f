"""What tools/infer.py does: detect in files, and write pictures, lines of JSON or COCO results."""

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mmcv
import torch
from mmdet.structures import DetDataSample
from mmengine.device import get_device
from rich.console import Console
from rich.progress import track

from mmdet_lors.engine.launch import load_config
from mmdet_lors.engine.machine import usable, use_device
from mmdet_lors.engine.processes.apart import Apart
from mmdet_lors.engine.resume.start import faults_in_one_line
from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer
from mmdet_lors.inference.records import Records, replaced
from mmdet_lors.inference.results import CocoIds, boxes
from mmdet_lors.inference.sources import check_not_input, find_sources, picture_paths
from mmdet_lors.inference.video import VideoFile, open_video
from mmdet_lors.valid_json import to_json


def check(args: argparse.Namespace, video: str | None, processes: int) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Raises:
        UserError: names the option and what would be right.
    """
    if not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr {args.score_thr}: must be from 0 to 1")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be 1 or more")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 or more")
    if not args.json and not args.coco:
        if args.no_pictures:
            raise UserError("--no-pictures leaves nothing to write: add --json or --coco FILE.json")
        if args.resume:
            raise UserError("--resume goes on with predictions.jsonl, which --json or --coco FILE.json writes")
    if args.ann_file and not args.coco:
        raise UserError("--ann-file is for --coco FILE.json, which is not given")
    if video and (args.coco or args.resume):
        option = "--coco" if args.coco else "--resume"
        raise UserError(f"{option} is for images: a video is one file, and its frames have no image ids; use --json")
    if video and processes > 1:
        raise UserError(f"{video} is a video, which one process reads: use tools/infer.py")
    if args.coco and not args.coco.parent.is_dir():
        raise UserError(f"--coco {args.coco}: folder {args.coco.parent} does not exist")
    if args.coco and (args.coco.is_dir() or not os.access(args.coco.parent, os.W_OK)):
        raise UserError(f"--coco {args.coco} cannot be written")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file, not a folder")


def progress(sequence: Iterable, total: int, shown: bool = True) -> Iterable:
    """Show a progress bar on stderr, not in the output."""
    console = Console(stderr=True)
    return track(sequence, "Inference", total=max(total, 0) or None, console=console, disable=not shown)


@dataclass
class Tally:
    """How many images or frames were read, the boxes above ``score_thr`` in them, and the images that were not read."""

    score_thr: float
    read: int = 0
    boxes: int = 0
    unreadable: int = 0

    def add(self, row: dict) -> None:
        """Count a result."""
        self.read += "boxes" in row
        self.unreadable += "error" in row
        self.boxes += sum(box["score"] > self.score_thr for box in row.get("boxes", ()))

    def sum(self, processes: Apart) -> None:
        """Wait for all processes, and count what they counted."""
        self.read, self.boxes, self.unreadable = processes.sum([self.read, self.boxes, self.unreadable])


def with_reasons(
    inferencer: Inferencer, images: list[str], batch_size: int, workers: int
) -> Iterator[tuple[str, DetDataSample | str]]:
    """Each image with its predictions, or with the reason why it cannot be read."""
    left = iter(images)
    for found, sample in inferencer.stream(images, batch_size, workers if len(images) > 1 else 0):
        for image in left:
            if image == found:
                break
            yield image, inferencer.unreadable.pop(image)
        yield found, sample
    for image in left:
        yield image, inferencer.unreadable.pop(image)


def run_images(
    args: argparse.Namespace,
    pictures: dict[str, Path],
    inferencer: Inferencer,
    ids: CocoIds | None,
    records: Records | None,
    processes: Apart,
) -> list[str]:
    """Detect in all images that have no result yet; returns the lines to print."""
    tally, done = Tally(args.score_thr), set()
    for row in records.rows() if records else ():
        if processes.rank == 0 and row["image"] not in done:
            tally.add(row)
        done.add(row["image"])
    if other := done - pictures.keys():
        raise UserError(f"{records.path} has a result of {min(other)}, which is not among the inputs")
    processes.sum()  # all know what there is before any adds to it
    images = [image for image in pictures if image not in done][processes.rank :: processes.world]
    found_in = with_reasons(inferencer, images, args.batch_size, args.workers)
    for image, found in progress(found_in, len(images), shown=processes.rank == 0):
        if isinstance(found, str):
            print(f"skipped {image}: {found}")
            row = dict(image=image, error=found)
        else:
            height, width = found.ori_shape
            row = dict(image=image, width=width, height=height, boxes=boxes(found, inferencer.classes, lowest(args)))
            if ids:
                ids.check_size(row)
            if not args.no_pictures:
                drawn = inferencer.draw(image, found, args.score_thr)
                if not mmcv.imwrite(drawn[..., ::-1], str(pictures[image])):
                    raise UserError(f"picture {pictures[image]} cannot be written")
        tally.add(row)
        if records:
            records.add(row)
    tally.sum(processes)
    if processes.rank > 0:
        return []
    if records:
        records.merge(pictures)
    if not tally.read:
        raise UserError(f"none of the {len(pictures)} inputs can be read as an image")
    if ids:
        write_coco(args.coco, records, ids)
    return summary(args, tally, "images", args.out, records)


def lowest(args: argparse.Namespace) -> float:
    """The score above which boxes are in predictions.jsonl: COCO results, which are made of it, have all boxes."""
    return -1.0 if args.coco else args.score_thr


def write_coco(path: Path, records: Records, ids: CocoIds) -> None:
    """Write all boxes as COCO results, one at a time."""
    with replaced(path) as file:
        file.write(b"[")
        separator = ""
        for row in records.rows():
            for result in ids.results(row) if "boxes" in row else ():
                file.write((separator + to_json(result)).encode())
                separator = ",\n"
        file.write(b"]\n")


def video_path(out: Path, video: str) -> Path:
    """The file for the video with boxes.

    Raises:
        UserError: it would overwrite the input.
    """
    target = out / f"{Path(video).stem}.mp4"
    check_not_input(target, video)
    return target


def run_video(
    args: argparse.Namespace, path: str, target: Path, inferencer: Inferencer, records: Records | None
) -> list[str]:
    """Detect in all frames of a video; returns the lines to print."""
    video = open_video(path)
    args.out.mkdir(parents=True, exist_ok=True)
    tally = Tally(args.score_thr)
    with VideoFile(target, video.fps) as drawn:
        for frame, sample in progress(inferencer.stream(video, args.batch_size), video.frame_cnt):
            row = dict(frame=tally.read, boxes=boxes(sample, inferencer.classes, args.score_thr))
            tally.add(row)
            if records:
                records.add(row)
            if not args.no_pictures:
                drawn.write(inferencer.draw(frame, sample, args.score_thr))
    if not tally.read:
        raise UserError(f"video {path} has no frame that can be read")
    return summary(args, tally, "frames", target, records)


def summary(args: argparse.Namespace, tally: Tally, what: str, drawn: Path, records: Records | None) -> list[str]:
    """Lines that say what was found and written."""
    lines = [f"{tally.read} {what}, {tally.boxes} boxes with a score above {args.score_thr:g}"]
    if tally.unreadable:
        lines.append(f"{tally.unreadable} files cannot be read")
    if not args.no_pictures:
        lines.append(f"pictures in {drawn}" if drawn == args.out else str(drawn))
    return lines + [str(path) for path in (args.coco, records and records.path) if path]


def infer(args: argparse.Namespace) -> None:
    """Check the inputs, load the detector, go through the inputs."""
    use_device(args.device, args.launcher)
    if args.launcher != "none" and get_device() == "cuda":
        torch.cuda.set_device(usable(f"cuda:{os.environ['LOCAL_RANK']}"))
    processes = Apart(args.launcher)
    images, video = find_sources(args.inputs, args.image_dir, args.out)
    check(args, video, processes.world)
    pictures = picture_paths(images, args.out) if images else video_path(args.out, video)
    records = None
    if args.json or args.coco:
        files = dict(config=os.path.abspath(args.config), checkpoint=os.path.abspath(args.checkpoint))
        run = files | {"video": video, "--cfg-options": args.cfg_options, "lowest score": lowest(args)}
        records = Records(args.out, run, processes.rank, processes.world)
        records.begin(args.resume)
    cfg = load_config(args.config, args.cfg_options)
    inferencer = Inferencer(cfg, args.checkpoint, args.device, skip_unreadable=len(images) > 1)
    ids = None
    if args.coco and args.ann_file:
        ids = CocoIds.from_annotations(args.ann_file, images, inferencer.classes, inferencer.frame)
    elif args.coco:
        ids = CocoIds.counted(images, inferencer.classes)
        if processes.rank == 0:
            print("image and category ids are counted from 1; for those of a data set use --ann-file")
    try:
        with faults_in_one_line("--resume goes on"):
            if video:
                lines = run_video(args, video, pictures, inferencer, records)
            else:
                lines = run_images(args, pictures, inferencer, ids, records, processes)
    except OSError as error:
        raise UserError(f"the results cannot be written: {error}") from error
    for line in lines:
        print(line)
