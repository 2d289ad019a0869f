"""What a trained AdaMixer, plain or with LORS, gains in time and loses in AP when it stops early.

Each setting is what test_cfg=dict(num_stages=..., keep_queries=[...]) of a config makes of it, without training again.
The metric is that of the config's test data set. Times are of the whole detector on the first batches of that data
set, without loading, LORS folded: medians over rounds in which the settings take turns.
"""

import argparse

from mmengine.config import Config, DictAction


def numbers(text: str) -> list[int]:
    """'50,30' -> [50, 30]."""
    return [int(number) for number in text.split(",")]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of the AdaMixer")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("--num-stages", nargs="+", type=int, metavar="S", help="stages that run (default: all numbers)")
    parser.add_argument("--keep-queries", nargs="+", type=numbers, default=[], metavar="N,N,...",
                        help="with all stages: queries that go on after each; one number stands for all")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="of the times (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=2, help="of the times (default: %(default)s)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override the config")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import contextlib
import io
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from mmengine.runner import Runner
from rich.table import Table

from mmdet_lors.adamixer import QueryBased
from mmdet_lors.analysis.output import console
from mmdet_lors.analysis.timing import hardware, interleaved, seconds
from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.reading import check_fit, read_checkpoint
from mmdet_lors.engine.config_check import check_config
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.engine.machine import use_device
from mmdet_lors.errors import UserError
from mmdet_lors.lors.serving import serve


def settings(args: argparse.Namespace, num_stages: int, test_cfg: dict) -> list[dict]:
    """The settings to compare, each a whole test_cfg; the first is the whole decoder."""
    stages = [num_stages, *(args.num_stages or range(num_stages - 1, 0, -1))]
    kept = [k * (num_stages - 1) if len(k) == 1 else k for k in args.keep_queries]
    ways = [(s, []) for s in dict.fromkeys(stages)] + [(num_stages, k) for k in kept]
    return [dict(test_cfg, num_stages=s, keep_queries=k) for s, k in ways]


def evaluate(runner: Runner, found: list[dict]) -> dict[str, list[float]]:
    """The evaluator's metrics with each setting."""
    metrics: dict[str, list[float]] = {}
    for setting in found:
        runner.model.decoder.set_test_cfg(**setting)
        with contextlib.redirect_stdout(io.StringIO()):
            for name, value in runner.test().items():
                metrics.setdefault(name, []).append(value)
    return metrics


@torch.no_grad()
def milliseconds(runner: Runner, found: list[dict], args: argparse.Namespace) -> list[float]:
    """Median time of an image with each setting."""
    model = serve(runner.model.eval())
    device = next(model.parameters()).device
    batches = list(islice(runner.test_dataloader, args.batches))
    data = [model.data_preprocessor(batch, False) for batch in batches]
    images = sum(len(batch["inputs"]) for batch in data)

    def detect(setting: dict) -> None:
        model.decoder.set_test_cfg(**setting)
        for batch in data:
            model.predict(batch["inputs"], batch["data_samples"])

    timed = {str(s): partial(seconds, partial(detect, s), device) for s in found}
    return [1000 * median(taken) / images for taken in interleaved(timed, args.rounds).values()]


def check(args: argparse.Namespace) -> tuple[Config, list[dict]]:
    """Read the config, and refuse what cannot work before anything is loaded.

    Raises:
        UserError: names the option or the field.
    """
    if args.rounds < 1 or args.batches < 1:
        raise UserError("--rounds and --batches must be 1 or more")
    use_device(args.device)
    cfg = load_config(args.config, args.cfg_options)
    model = build_without_weights(cfg.model)
    if not isinstance(model, QueryBased):
        raise UserError(f"model.type {cfg.model.type} is not an AdaMixer: early exit is a setting of its decoder")
    found = settings(args, model.decoder.num_stages, cfg.model.get("test_cfg") or {})
    for setting in found:
        build_without_weights(cfg.model | dict(test_cfg=setting))
    check_fit(model, read_checkpoint(args.checkpoint), args.checkpoint)
    check_config(cfg, ("test",))
    check_inputs(cfg, ("test",))
    return cfg, found


def main() -> None:
    """Evaluate and time all settings, and print them as a table."""
    args = parse_args()
    cfg, found = check(args)
    cfg.load_from, cfg.log_level = args.checkpoint, "ERROR"
    with TemporaryDirectory() as folder:
        cfg.work_dir = folder
        runner = Runner.from_cfg(cfg)
        metrics = evaluate(runner, found)
        times = milliseconds(runner, found, args)
    grid = Table(title=f"{Path(args.checkpoint).name} on {hardware(next(runner.model.parameters()).device)}")
    names = list(metrics)[:2]
    for name in ("num_stages", "keep_queries", *names, "ms / image", "of the first"):
        grid.add_column(name, justify="right")
    for i, setting in enumerate(found):
        kept = " ".join(map(str, setting["keep_queries"] or ["all"]))
        values = [f"{metrics[name][i]:.3f}" for name in names]
        grid.add_row(str(setting["num_stages"]), kept, *values, f"{times[i]:.1f}", f"{times[i] / times[0]:.2f}")
    console().print(grid)


if __name__ == "__main__":
    run(main)
