"""Fold a trained AdaMixer with LORS, or any model with LoRA, into the equivalent plain model.

Writes a checkpoint, OUT, and beside it its config, OUT with the ending .py. Both work wherever the plain model does:
tools/test.py OUT.py OUT.pth. The result is as large as the plain model, without any extra cost of LORS or LoRA. Of an
AdaMixer that has both, LoRA is folded; fold the result to fold LORS.
"""

import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of the AdaMixer with LORS, or of the model with LoRA")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT.pth", help="checkpoint to write")
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32", "float64"],
        default="float32",
        help="data type in which weights are stored (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import torch
from mmdet.registry import MODELS

from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.conversion.folding import folded_config, folded_state_dict
from mmdet_lors.engine.checkpoint.config_and_weights import read_weights
from mmdet_lors.engine.checkpoint.reading import write_checkpoint
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError


def main() -> None:
    """Check everything first, then fold, then write."""
    args = parse_args()
    config = args.out.with_suffix(".py")
    check_writable("OUT", args.out, formats=())
    if args.out == config:
        raise UserError(f"OUT {args.out}: must be a checkpoint file, not .py")

    cfg = load_config(args.config)
    plain = folded_config(cfg.model)
    if plain is None:
        raise UserError(f"{args.config}: no LoRA, and model.decoder.lors is not set: there is nothing to fold")
    model = MODELS.build(cfg.model)
    weights, meta = read_weights(args.checkpoint, model)
    model.load_state_dict(weights)
    folded = folded_state_dict(model, getattr(torch, args.dtype))
    for key, value in folded.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{key} does not fit into {args.dtype}: some values overflow")
    cfg.model = plain
    for key in ("work_dir", "launcher"):
        cfg.pop(key, None)
    meta = {k: meta[k] for k in ("dataset_meta",) if k in meta}
    write_checkpoint(dict(meta=dict(meta, cfg=cfg.pretty_text), state_dict=folded), args.out)
    cfg.dump(config)
    print(f"wrote {args.out} and {config}")


if __name__ == "__main__":
    run(main)
