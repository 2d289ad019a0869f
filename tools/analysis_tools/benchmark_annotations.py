"""Time how mmdet loads an annotation file of COCO's size, and how we do, with our checks.

The file is synthetic, by default with as many images and annotations with polygons as COCO's train2017. Each loading
is a new process, mmdet's and ours in turn. `train` loads the file once, for training; `train and val` also as
validation data with its metric, like a run that uses one file for both. Imports are not counted.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287, help="default: %(default)s")
    parser.add_argument("--annotations", type=int, default=860_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each loading (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the seconds to this file")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json

CLASSES = tuple(f"class {i}" for i in range(80))


def write_file(path: Path, images: int, annotations: int) -> None:
    """Write a data set whose objects are spread over its images, with polygons of COCO's mean length."""
    numbers = random.Random(0)
    content = dict(
        images=[dict(id=i, file_name=f"{i:012}.jpg", width=640, height=480, license=1) for i in range(1, images + 1)],
        categories=[dict(id=i, name=name, supercategory="thing") for i, name in enumerate(CLASSES, start=1)],
        annotations=[],
    )
    for i in range(1, annotations + 1):
        x, y, w, h = (round(numbers.uniform(1, limit), 2) for limit in (400, 300, 200, 150))
        polygon = [round(low + size * numbers.random(), 2) for _ in range(22) for low, size in ((x, w), (y, h))]
        row = dict(id=i, image_id=numbers.randint(1, images), category_id=numbers.randint(1, 80), bbox=[x, y, w, h])
        row |= dict(area=round(w * h / 2, 4), iscrowd=0, segmentation=[polygon])
        content["annotations"].append(row)
    path.write_text(json.dumps(content))


def load(who: str, what: str, file: str) -> None:
    """Do what a run does with the file before its first iteration."""
    from mmdet.datasets import CocoDataset
    from mmdet.evaluation import CocoMetric

    from mmdet_lors.datasets import CheckedCocoDataset, CheckedCocoMetric
    from mmdet_lors.datasets.evaluation import compare
    from mmdet_lors.datasets.files import annotation_file, keep, release

    fields = dict(ann_file=file, metainfo=dict(classes=CLASSES), data_prefix=dict(img=""))
    if who == "ours":
        keep()
        annotation_file(file).check(CLASSES, evaluated=False)
    dataset, metric = (CheckedCocoDataset, CheckedCocoMetric) if who == "ours" else (CocoDataset, CocoMetric)
    made = [dataset(**fields, filter_cfg=dict(filter_empty_gt=True, min_size=32))]
    if what != "train":
        if who == "ours":
            annotation_file(file).check(CLASSES, evaluated=True)
        made += [dataset(**fields, test_mode=True), metric(file)]
        if who == "ours":
            compare(made[2], made[1], "val_evaluator", "val_dataloader")
    release()


def measure(who: str, what: str, file: str) -> None:
    """Print the seconds and the peak memory of one loading."""
    with contextlib.redirect_stdout(io.StringIO()):
        import mmdet_lors.datasets  # noqa: F401

        start = time.perf_counter()
        load(who, what, file)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(to_json(dict(seconds=seconds, gigabytes=peak)))


def main() -> None:
    """Write the file, time the loadings, print a table."""
    args = parse_args()
    if args.measure:
        measure(*args.measure)
        return
    if min(args.images, args.annotations, args.rounds) < 1:
        raise UserError("--images, --annotations and --rounds must be 1 or more")
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "instances.json")
        write_file(file, args.images, args.annotations)
        print(f"{args.images} images, {args.annotations} annotations, {file.stat().st_size / 1e6:.0f} MB", flush=True)
        for _ in range(args.rounds):
            for what in ("train", "train and val"):
                for who in ("mmdet", "ours"):
                    command = [sys.executable, __file__, "--measure", who, what, str(file)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise UserError(f"loading as {who} failed: {done.stderr.strip().splitlines()[-1]}")
                    measured = json.loads(done.stdout.splitlines()[-1])
                    print(f"{what}: {who} {measured['seconds']:.1f} s", flush=True)
                    found.setdefault(f"{what}: {who}", []).append(measured)
    for name, rows in found.items():
        seconds = [row["seconds"] for row in rows]
        median = statistics.median(seconds)
        base = statistics.median(row["seconds"] for row in found[f"{name.split(':')[0]}: mmdet"])
        print(
            f"{name:22} {median:6.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), {median / base:.0%} of mmdet's, "
            f"at most {max(row['gigabytes'] for row in rows):.1f} GB"
        )
    if args.json:
        args.json.write_text(to_json(found, indent=1) + "\n")


if __name__ == "__main__":
    from mmdet_lors.engine.launch import run

    run(main)
