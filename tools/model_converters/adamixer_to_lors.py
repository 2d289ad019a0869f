"""Warm start: turn the weights of a trained plain AdaMixer into weights of an AdaMixer with LORS.

What LORS shares and factorises is fitted (mmdet_lors/lors/warm_start.py), everything else is copied. Both configs need
the same stages: the same number of them, sampling groups and points. Train from the result with
tools/train.py LORS_CONFIG --cfg-options load_from=OUT.

With --params, K and r of every stage are chosen so that the error is smallest, instead of those of LORS_CONFIG; the
config with them is printed, and written beside OUT as .py.
"""

import argparse
import inspect
from pathlib import Path

from rich.console import Console
from rich.table import Table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of the plain AdaMixer")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("lors_config", help="config of the AdaMixer with LORS")
    parser.add_argument("out", type=Path, help="checkpoint to write")
    parser.add_argument(
        "--turns",
        type=int,
        default=20,
        help="how often shared and private parts are refitted in turn (default: %(default)s)",
    )
    parser.add_argument("--params", metavar="N", help="of the whole LORS model, such as 30M, or 60%% of CONFIG's")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_lors.adamixer import AdaMixerDecoderStage
from mmdet_lors.analysis.arguments import check_writable, quantity
from mmdet_lors.analysis.complexity import build_on_meta
from mmdet_lors.conversion.warm_start import Errors, lors_for_budget, start_from_plain_
from mmdet_lors.engine.checkpoint.config_and_weights import read_config, read_weights
from mmdet_lors.engine.checkpoint.reading import write_checkpoint
from mmdet_lors.engine.launch import run
from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError


def check_configs(plain: Config, lors: Config) -> None:
    """Refuse two configs between which weights cannot be converted.

    Raises:
        UserError: the first has LORS or the second has none, or their stages differ; names the field.
    """
    if plain.model.decoder.get("lors") is not None:
        raise UserError(f"{plain.filename}: model.decoder.lors is set; CONFIG must be a plain AdaMixer")
    if lors.model.decoder.get("lors") is None:
        raise UserError(f"{lors.filename}: model.decoder.lors is not set; LORS_CONFIG must be an AdaMixer with LORS")
    defaults = {k: p.default for k, p in inspect.signature(AdaMixerDecoderStage).parameters.items()}
    fields = ["num_stages", "num_classes", "featmap_strides"]
    theirs, ours = ({f: cfg.model.decoder[f] for f in fields} for cfg in (plain, lors))
    for found, cfg in ((theirs, plain), (ours, lors)):
        stage = defaults | dict(cfg.model.decoder.stage)
        stage |= dict(type=type_name(stage["type"]))
        found.update({f"stage.{k}": stage[k] for k in sorted(stage) if k not in ("num_classes", "init_cfg")})
    for field, value in ours.items():
        if theirs.get(field) != value:
            raise UserError(
                f"model.decoder.{field} is {theirs.get(field)} in {plain.filename} and {value} in {lors.filename}: "
                "a warm start needs equal stages"
            )


def error_table(errors: Errors) -> Table:
    """Relative errors, one row per stage and weight."""
    table = Table(title="relative error of the fitted weights, |W_plain - W_LORS| / |W_plain|", title_justify="left")
    for column in ("stage", "weight", "mean of the stages alone", "LORS"):
        table.add_column(column, justify="right" if column != "weight" else "left")
    for (stage, weight), error in sorted(errors.items()):
        table.add_row(str(stage), weight, f"{error.mean:.4f}", f"{error.fitted:.4f}")
    return table


def main() -> None:
    """Check everything first, then fit, then write."""
    args = parse_args()
    if args.turns < 1:
        raise UserError(f"--turns must be 1 or more, got {args.turns}")
    check_writable("OUT", args.out, formats=(".pth",) if args.params else ())

    plain, lors = read_config(args.config), read_config(args.lors_config)
    check_configs(plain, lors)
    plain_model = build_on_meta(plain.model)
    weights, meta = read_weights(args.checkpoint, plain_model)
    console = Console()
    if args.params:
        whole = sum(p.numel() for p in plain_model.parameters())
        if (parameters := quantity("--params", args.params, whole)) > whole:
            raise UserError(f"--params {args.params} is above the {whole:,} of {args.config}")
        for half, chosen in lors_for_budget(build_on_meta(lors.model), weights, parameters).items():
            lors.model.decoder.lors[half].update(chosen)
        console.print(f"model = dict(decoder=dict(lors={lors.model.decoder.lors.to_dict()}))", soft_wrap=True)
    model = MODELS.build(lors.model)
    errors = start_from_plain_(model, weights, args.turns)
    meta = {k: meta[k] for k in ("dataset_meta",) if k in meta}
    write_checkpoint(dict(meta=dict(meta, cfg=lors.pretty_text), state_dict=model.state_dict()), args.out)
    console.print(error_table(errors))
    if args.params:
        lors.dump(args.out.with_suffix(".py"))
    size = sum(p.numel() for p in model.parameters())
    console.print(f"{size:,} parameters; wrote {args.out}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
