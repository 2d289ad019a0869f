"""What tools/infer.py does: detect in files, and write pictures, JSON or COCO results."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import mmcv
from rich.console import Console
from rich.progress import track

from mmdet_lors.engine.launch import load_config
from mmdet_lors.engine.machine import use_device
from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer
from mmdet_lors.inference.results import CocoIds, boxes
from mmdet_lors.inference.sources import check_not_input, find_sources, picture_paths
from mmdet_lors.inference.video import VideoFile, open_video
from mmdet_lors.valid_json import to_json


def check(args: argparse.Namespace, video: str | None) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Raises:
        UserError: names the option and what would be right.
    """
    if not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr {args.score_thr}: must be from 0 to 1")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be 1 or more")
    if args.no_pictures and not args.json and not args.coco:
        raise UserError("--no-pictures leaves nothing to write: add --json or --coco FILE.json")
    if args.ann_file and not args.coco:
        raise UserError("--ann-file is for --coco FILE.json, which is not given")
    if args.coco and video:
        raise UserError("--coco is for images: a video's frames have no image ids; use --json")
    if args.coco and not args.coco.parent.is_dir():
        raise UserError(f"--coco {args.coco}: folder {args.coco.parent} does not exist")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file, not a folder")


def progress(sequence: Iterable, total: int) -> Iterable:
    """Show a progress bar on stderr, not in the output."""
    return track(sequence, "Inference", total=max(total, 0) or None, console=Console(stderr=True))


def run_images(
    args: argparse.Namespace, pictures: dict[str, Path], inferencer: Inferencer, ids: CocoIds | None
) -> list[str]:
    """Detect in all images, batch by batch; returns the lines to print."""
    images = list(pictures)
    found, results = [], []
    for image, sample in progress(inferencer.stream(images, args.batch_size), len(images)):
        height, width = sample.ori_shape
        listed = boxes(sample, inferencer.classes, args.score_thr)
        found.append(dict(image=image, width=width, height=height, boxes=listed))
        if not args.no_pictures:
            drawn = inferencer.draw(image, sample, args.score_thr)
            if not mmcv.imwrite(drawn[..., ::-1], str(pictures[image])):
                raise UserError(f"picture {pictures[image]} cannot be written")
        if ids:
            results += ids.results(image, sample)
    for name, reason in inferencer.unreadable.items():
        print(f"skipped {name}: {reason}")
    if not found:
        raise UserError(f"none of the {len(images)} inputs can be read as an image")
    written = [] if args.no_pictures else [f"pictures in {args.out}"]
    if ids:
        args.coco.write_text(to_json(results) + "\n")
        written.append(str(args.coco))
    return summary(args, found, "images", written)


def video_path(out: Path, video: str) -> Path:
    """The file for the video with boxes.

    Raises:
        UserError: it would overwrite the input.
    """
    target = out / f"{Path(video).stem}.mp4"
    check_not_input(target, video)
    return target


def run_video(args: argparse.Namespace, path: str, target: Path, inferencer: Inferencer) -> list[str]:
    """Detect in all frames of a video; returns the lines to print."""
    video = open_video(path)
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    with VideoFile(target, video.fps) as drawn:
        for frame, sample in progress(inferencer.stream(video, args.batch_size), video.frame_cnt):
            found.append(dict(frame=len(found), boxes=boxes(sample, inferencer.classes, args.score_thr)))
            if not args.no_pictures:
                drawn.write(inferencer.draw(frame, sample, args.score_thr))
    if not found:
        raise UserError(f"video {path} has no frame that can be read")
    return summary(args, found, "frames", [] if args.no_pictures else [str(target)])


def summary(args: argparse.Namespace, found: list[dict], what: str, written: list[str]) -> list[str]:
    """Write the JSON if asked to; returns lines that say what was found and written."""
    if args.json:
        file = args.out / "predictions.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_json(found, indent=1) + "\n")
        written = [*written, str(file)]
    count = sum(len(row["boxes"]) for row in found)
    return [f"{len(found)} {what}, {count} boxes with a score above {args.score_thr:g}", *written]


def infer(args: argparse.Namespace) -> None:
    """Check the inputs, load the detector, go through the inputs."""
    use_device(args.device)
    images, video = find_sources(args.inputs)
    check(args, video)
    pictures = picture_paths(images, args.out) if images else video_path(args.out, video)
    cfg = load_config(args.config, args.cfg_options)
    inferencer = Inferencer(cfg, args.checkpoint, args.device, skip_unreadable=len(images) > 1)
    ids = None
    if args.coco and args.ann_file:
        ids = CocoIds.from_annotations(args.ann_file, images, inferencer.classes, inferencer.frame)
    elif args.coco:
        ids = CocoIds.counted(images, inferencer.classes)
        print("image and category ids are counted from 1; for those of a data set use --ann-file")
    try:
        lines = run_video(args, video, pictures, inferencer) if video else run_images(args, pictures, inferencer, ids)
    except OSError as error:
        raise UserError(f"the results cannot be written: {error}") from error
    print("\n".join(lines))
