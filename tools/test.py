"""Evaluate a detector or a classifier: the entry point behind dist_test.sh and slurm_test.sh."""

import argparse

from launch.common_options import add_common_options


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluate a detector or a classifier.")
    add_common_options(parser)
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("--out", metavar="FILE.pkl", help="also write the raw predictions to this file")
    parser.add_argument("--metrics", metavar="FILE.json", help="also write the metrics to this file")
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="save pictures of the predictions in this folder of the run's folder",
    )
    parser.add_argument(
        "--show-interval",
        type=int,
        default=50,
        metavar="N",
        help="draw every N-th image (default: %(default)s)",
    )
    parser.add_argument(
        "--wait-time", type=float, default=2, metavar="S", help="seconds per window (default: %(default)s)"
    )
    parser.add_argument(
        "--tta", action="store_true", help="test-time augmentation: each image also flipped, merged by NMS"
    )
    return parser.parse_args()


def main() -> None:
    """Evaluate."""
    args = parse_args()
    from mmdet_lors.commands.test import test

    test(args)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds
    from mmdet_lors.engine.launch import run

    run(main)
