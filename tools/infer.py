"""Detect objects in images, folders of them, or a video, and write pictures, lines of JSON or COCO results."""

import argparse
from pathlib import Path

from mmengine.config import DictAction


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, folders with those below them, patterns such as 'a/**/*.jpg', text files with a path per line, "
        "COCO JSONs, or one video",
    )
    parser.add_argument("config", metavar="CONFIG", help="config file")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint file")
    parser.add_argument(
        "--image-dir",
        type=Path,
        metavar="DIR",
        help="the folder that paths in a text file or JSON start from (default: its own)",
    )
    parser.add_argument("--out", type=Path, default="work_dirs/infer", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--no-pictures", action="store_true", help="do not draw: write no pictures and no video")
    parser.add_argument(
        "--json", action="store_true", help="write the boxes above --score-thr to DIR/predictions.jsonl"
    )
    parser.add_argument("--coco", type=Path, metavar="FILE.json", help="write all boxes as COCO results, and as --json")
    parser.add_argument(
        "--ann-file",
        type=Path,
        metavar="FILE.json",
        help="annotation file with the image and category ids for --coco",
    )
    parser.add_argument("--resume", action="store_true", help="go on where DIR/predictions.jsonl ends")
    parser.add_argument(
        "--score-thr", type=float, default=0.3, metavar="S", help="lowest score of a drawn box (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that read images ahead (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda:N, mps or xpu (default: a GPU if there is one)")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="settings that override the config"
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch"],
        default="none",
        help="how the processes were started; dist_infer.sh sets it",
    )
    return parser.parse_args()


def main() -> None:
    """Detect."""
    args = parse_args()
    from mmdet_lors.commands.infer import infer

    infer(args)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds
    from mmdet_lors.engine.launch import run

    run(main)
