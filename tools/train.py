"""Train a detector or a classifier: the entry point behind dist_train.sh and slurm_train.sh."""

import argparse

from launch.common_options import add_common_options


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a detector or a classifier.")
    add_common_options(parser)
    parser.add_argument(
        "--amp",
        nargs="?",
        const="auto",
        choices=["auto", "float16", "bfloat16"],
        help="mixed precision; auto is float16 with loss scaling on a CUDA GPU, bfloat16 elsewhere",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate from the config's base batch size to the actual one",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint, or from the newest one in the work folder when none is given",
    )
    return parser.parse_args()


def main() -> None:
    """Train; SIGTERM stops the run after an iteration, with exit status 0."""
    args = parse_args()
    from mmdet_lors.commands.train import train

    train(args)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds
    from mmdet_lors.engine.launch import run

    run(main)
