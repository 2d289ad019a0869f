"""Print the results of a finished run: AP, training time, decoder parameters beside plain AdaMixer's, pictures."""

import argparse
import json
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file of the run")
    parser.add_argument("work_dir", type=Path, help="folder with metrics.json from tools/test.py --metrics")
    parser.add_argument("--training-seconds", type=float, help="how long training took")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_lors.analysis.study import ROOT
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

STUDY = ROOT / "docs/measured/decoder_study.json"


def decoder_study() -> str:
    """The mean AP of LORS and of plain in the decoder study, whose models are others than the run's."""
    rows = json.loads(STUDY.read_text())["rows"]
    runs = {name: [run["ap"] for run in rows[name]["runs"] if "ap" in run] for name in ("LORS", "plain")}
    found = ", ".join(f"{name} {mean(aps):.3f} ({len(aps)} runs)" for name, aps in runs.items())
    return f"{found}; AP of larger decoders on frozen features, docs/measured/decoder_study.md"


def decoder_parameters(cfg: Config, lors: dict | None) -> int:
    """Parameters of the config's decoder with this ``lors`` field."""
    decoder = dict(cfg.model.decoder, lors=lors)
    return sum(p.numel() for p in MODELS.build(decoder).parameters())


def main() -> None:
    """Read what the run wrote, and print the table."""
    args = parse_args()

    cfg = Config.fromfile(args.config)
    register_all_modules()
    metrics_file = args.work_dir / "metrics.json"
    if not metrics_file.is_file():
        raise UserError(f"{metrics_file} does not exist: write it with tools/test.py --metrics {metrics_file}")
    metrics = json.loads(metrics_file.read_text())
    folders = sorted(args.work_dir.glob("**/pictures"), key=lambda folder: folder.stat().st_mtime)
    pictures = list(folders[-1].iterdir()) if folders else []

    table = Table(title=Path(args.config).stem, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("AP (COCO, 0.50:0.95)", f"{metrics['coco/bbox_mAP']:.3f}")
    table.add_row("AP50", f"{metrics['coco/bbox_mAP_50']:.3f}")
    if args.training_seconds is not None:
        minutes, seconds = divmod(round(args.training_seconds), 60)
        table.add_row("training time", f"{minutes} min {seconds:02d} s")
    plain, lors = decoder_parameters(cfg, None), decoder_parameters(cfg, cfg.model.decoder.get("lors"))
    table.add_row("decoder parameters", f"{lors:,} ({lors / plain:.0%} of plain AdaMixer's)")
    table.add_row("plain AdaMixer, same shape", f"{plain:,}")
    if "digits" in str(cfg.train_dataloader) and STUDY.is_file():
        table.add_row("LORS beside plain, decoder study", decoder_study())
    table.add_row("pictures", f"{len(pictures)} in {folders[-1]}" if pictures else "none")
    Console().print(table)


if __name__ == "__main__":
    run(main)
