"""Write a trained model as one folder, to keep, serve or upload: weights, a flat config and a model card.

  DIR/model.safetensors  the weights, and the names of the classes
  DIR/config.py          the config with all that it inherits
  DIR/README.md          what the model is, its classes, parameters and metrics, and how to use it

DIR then stands for the model: Inferencer("DIR"), tools/test.py DIR DIR, tools/infer.py IMAGES DIR DIR, and every other
tool that takes CONFIG and CHECKPOINT.
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
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write; it must not exist or be empty")
    parser.add_argument("--fold", action="store_true", help="fold LoRA, or LORS: the plain model, as large as one")
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="for the card: what tools/test.py --metrics wrote")
    parser.add_argument("--license", default="unknown", metavar="NAME", help="for the card (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import json
import shutil
from tempfile import mkdtemp

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from safetensors.torch import save_file
from torch import nn

from mmdet_lors.conversion.folding import folded_config, folded_state_dict
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.config_and_weights import read_weights
from mmdet_lors.engine.checkpoint.model_folder import CARD, CONFIG, WEIGHTS
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json

OF_A_RUN = ("work_dir", "launcher", "load_from", "resume")
"""Fields of a config that belong to the run that trained the model, not to the model."""


def millions(module: nn.Module) -> str:
    """Number of parameters."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def card(name: str, cfg: Config, model: nn.Module, classes: list[str], metrics: dict, licence: str) -> str:
    """The model card, as Hugging Face's hub reads it."""
    kind = type_name(cfg.model.type)
    decoder = getattr(model, "decoder", None)
    lors = getattr(decoder, "lorsa", None) is not None or getattr(decoder, "lorst", None) is not None
    parts = [f"- {part}: {millions(module)} parameters" for part, module in model.named_children() if any(
        True for _ in module.parameters())]  # fmt: skip
    rows = [f"| {metric} | {value} |" for metric, value in metrics.items()]
    return "\n".join([
        "---", "library_name: mmdet_lors", f"license: {licence}", "tags: [mmdetection]", "---", "",
        f"# {name}", "",
        f"A `{kind}`{' with LORS' if lors else ''} of mmdet_lors, {millions(model)} parameters:", "", *parts, "",
        f"## Classes ({len(classes)})", "", ", ".join(classes) or "They are not in the checkpoint.", "",
        "## Metrics", "", *(["| metric | value |", "|---|---|", *rows] if rows else ["None were given."]), "",
        "## Use", "", "```python", "from mmdet_lors.inference import Inferencer", "",
        f'Inferencer("{name}")("image.jpg")', "```", "",
        f"Or `python tools/test.py {name} {name}`. `{CONFIG}` is Python code that is executed when it is read: take it "
        "from people whom you trust, or use a config of your own in its place.", "",
    ])  # fmt: skip


def read_metrics(path: Path | None) -> dict:
    """The metrics for the card.

    Raises:
        UserError: the file is not what tools/test.py --metrics writes.
    """
    if path is None:
        return {}
    try:
        metrics = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--metrics {path} cannot be read: {error}") from error
    if not isinstance(metrics, dict):
        raise UserError(f"--metrics {path} holds no metrics by name")
    return metrics


def main() -> None:
    """Check everything first, then write beside DIR, then rename."""
    args = parse_args()
    if args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir())):
        raise UserError(f"DIR {args.out} exists already")
    if not args.out.parent.is_dir():
        raise UserError(f"DIR {args.out}: folder {args.out.parent} does not exist")
    metrics = read_metrics(args.metrics)
    cfg = load_config(args.config)
    weights, meta = read_weights(args.checkpoint, build_without_weights(cfg.model))
    model = MODELS.build(cfg.model)
    model.load_state_dict(weights)
    if args.fold:
        plain = folded_config(cfg.model)
        if plain is None:
            raise UserError(f"--fold: {args.config} has no LoRA and no AdaMixer with LORS, there is nothing to fold")
        weights, cfg.model = folded_state_dict(model), plain
        model = build_without_weights(cfg.model)
    else:
        weights = model.state_dict()
    dataset = meta.get("dataset_meta")
    if dataset is None and cfg.get("test_dataloader"):
        dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True)).metainfo
    for field in OF_A_RUN:
        cfg.pop(field, None)
    try:
        unfinished = Path(mkdtemp(prefix=f".{args.out.name}.", dir=args.out.parent))
        try:
            # Copies, since safetensors refuses weights that are one tensor under two names.
            save_file({k: v.clone().contiguous() for k, v in weights.items()}, unfinished / WEIGHTS,
                      dict(format="pt", dataset_meta=to_json(dict(dataset or {}))))  # fmt: skip
            cfg.dump(unfinished / CONFIG)
            classes = list((dataset or {}).get("classes", ()))
            text = card(args.out.name, cfg, model, classes, metrics, args.license)
            (unfinished / CARD).write_text(text)
            unfinished.chmod(0o755)
            unfinished.replace(args.out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}") from error
    print(f"wrote {args.out}")
    for path in sorted(args.out.iterdir()):
        print(f"  {path.name}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
