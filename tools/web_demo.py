"""Serve a web page and an HTTP API on this machine that detect objects in pictures."""

import argparse
import os
import socket
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config, DictAction


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="config file")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint file")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 allows other machines (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8080, help="default: %(default)s")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda:N, mps or xpu (default: a GPU if there is one)")
    parser.add_argument(
        "--score-thr",
        type=float,
        default=0.3,
        metavar="S",
        help="lowest score: where the slider starts, and the API's if a request has none (default: %(default)s)",
    )
    parser.add_argument(
        "--max-megabytes", type=float, default=10, metavar="MB", help="largest picture accepted (default: %(default)s)"
    )
    parser.add_argument(
        "--max-pictures", type=int, default=8, metavar="N", help="most in a request to the API (default: %(default)s)"
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=16,
        metavar="N",
        help="requests to the API that may wait while one is answered; others are refused (default: %(default)s)",
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="settings that override the config"
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds
    # OpenCV reads it when it is imported. As pictures.MAX_PIXELS, for files that show Pillow another size.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "40000000")

from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer
from mmdet_lors.inference.sources import find_sources


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Raises:
        UserError: names the option and what would be right.
    """
    if find_spec("nicegui") is None:
        raise UserError("the web page needs NiceGUI: pip install -e .[web]")
    if not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr {args.score_thr}: must be from 0 to 1")
    if args.max_megabytes <= 0:
        raise UserError(f"--max-megabytes {args.max_megabytes}: must be above 0")
    if args.max_pictures < 1:
        raise UserError(f"--max-pictures {args.max_pictures}: must be 1 or more")
    if args.queue < 0:
        raise UserError(f"--queue {args.queue}: must be 0 or more")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: must be from 1 to 65535")
    try:
        with socket.create_server((args.host, args.port)):
            pass
    except OSError as error:
        raise UserError(f"cannot listen on {args.host}:{args.port}: {error.strerror}") from error


def example_of(cfg: Config) -> Path | None:
    """The first image of the config's test data, or None if that data does not exist."""
    dataset = cfg.test_dataloader.dataset
    folder = Path(dataset.get("data_root") or "", (dataset.get("data_prefix") or {}).get("img") or "")
    try:
        return Path(find_sources([str(folder)])[0][0])
    except UserError:
        return None


def main() -> None:
    """Check the options, load the detector, and serve until interrupted."""
    args = parse_args()
    check(args)
    cfg = load_config(args.config, args.cfg_options)
    inferencer = Inferencer(cfg, args.checkpoint, args.device, show_progress=False)

    import uvicorn

    from mmdet_lors.inference.api import Limits
    from mmdet_lors.inference.web import make_app

    limits = Limits(round(args.max_megabytes * 10**6), args.max_pictures, args.queue)
    title = f"{Path(args.config).stem}, {Path(args.checkpoint).name}"
    app = make_app(inferencer, title, example_of(cfg), limits, args.score_thr)
    address = f"http://{args.host}:{args.port}"
    print(f"open {address}, or post pictures to {address}/detect; stop with Ctrl+C", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    run(main)
