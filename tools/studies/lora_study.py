"""Teach a detector of the digits 0 to 7 the other two with LoRA, and write docs/measured/lora_study.md.

The detector is trained once; then, from its weights, the layers that score classes alone, these and adapters of low
rank, and everything. AP before and after, on the digits that it knew and on the new ones. A run that has finished is
not repeated: the study can be interrupted and called again.
"""

import argparse
from pathlib import Path

from options import ROOT, add_study_options


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-epochs", type=int, default=12, help="of the first detector (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of what comes after it (default: %(default)s)")
    add_study_options(parser, "lora_study")
    parser.set_defaults(out=ROOT / "docs/measured/lora_study.md")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from collections.abc import Mapping
from statistics import mean

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_lors.analysis.study import call, evaluate, last_epoch_only, made_by, once, side_by_side, table, train
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

BASE, LORA, PLAIN = (
    f"configs/{name}.py"
    for name in ("lora/adamixer_r18_digits-0-7", "lora/adamixer-lora_r18_digits", "adamixer/adamixer_r18_digits")
)
VARIANTS = {
    "the scores' last layer": "model.update(targets=[])",
    "and adapters": "",
    "everything": "model.update(targets=[], train=['*'])",
}
"""What is trained on all ten digits, and the line of its config that says so."""


def trained(config: str | Path, epochs: int, folder: Path) -> Path:
    """The checkpoint of a run, trained now or before."""
    checkpoint = folder / f"epoch_{epochs}.pth"
    if not checkpoint.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        length = ["train_cfg.max_epochs", "param_scheduler.1.end", "param_scheduler.1.T_max"]
        train(str(config), folder, [*(f"{field}={epochs}" for field in length), *last_epoch_only(epochs)])
    return checkpoint


def published(config: str | Path, checkpoint: Path, folder: Path) -> int:
    """Bytes of the weights that publish_model.py writes."""
    out = folder / "published"
    if not out.exists():
        call("tools/model_converters/publish_model.py", str(config), str(checkpoint), str(out), log=folder / "log.txt")
    return (out / "model.safetensors").stat().st_size


def precision(config: str | Path, checkpoint: Path, folder: Path) -> dict[str, float]:
    """Mean AP, in points, of the digits 0 to 7, of 8 and 9, and of all; one that the detector does not know has 0."""
    metrics = evaluate(str(config), checkpoint, folder, ["test_evaluator.classwise=True"])
    found = [100 * metrics.get(f"coco/{digit}_precision", 0.0) for digit in range(10)]
    return dict(old=mean(found[:8]), new=mean(found[8:]), all=mean(found))


def begin(folder: Path, epochs: int) -> dict:
    """Train the detector of 0 to 7, and evaluate it."""
    checkpoint = trained(BASE, epochs, folder)
    return precision(BASE, checkpoint, folder) | dict(bytes=published(BASE, checkpoint, folder))


def go_on(name: str, base: Path, folder: Path, epochs: int) -> dict:
    """Train one of the variants from the first detector's weights, evaluate it, merge it, and evaluate that."""
    config, merged = folder / "config.py", folder / "merged.pth"
    text = f"_base_ = {str(ROOT / LORA)!r}\nmodel = dict(checkpoint={str(base)!r})\n{VARIANTS[name]}\n"
    config.write_text(text)
    parameters = [p for p in MODELS.build(Config.fromfile(config).model).parameters() if p.requires_grad]
    checkpoint = trained(config, epochs, folder)
    found = precision(config, checkpoint, folder) | dict(bytes=published(config, checkpoint, folder))
    call("tools/deployment/fold_lors.py", str(config), str(checkpoint), str(merged), log=folder / "log.txt")
    return found | dict(parameters=sum(p.numel() for p in parameters), merged=precision(PLAIN, merged, folder)["all"])


def page(base: Mapping, results: Mapping[str, Mapping], epochs: tuple[int, int], jobs: int) -> str:
    """The study as Markdown.

    Args:
        base: the first detector's outcome.
        results: the outcome of each variant.
        epochs: of the first detector, and of what comes after it.
        jobs: how many ran side by side.
    """
    aps = [[f"{found[part]:.1f}" for part in ("old", "new", "all")] for found in (base, *results.values())]
    rows = [["nothing: the detector of 0 to 7", "", *aps[0], f"{base['bytes']:,}", "", ""]]
    for (name, found), ap in zip(results.items(), aps[1:], strict=True):
        share = f"{100 * found['bytes'] / base['bytes']:.2f} %"
        rows.append([name, f"{found['parameters']:,}", *ap, f"{found['bytes']:,}", share, f"{found['merged']:.1f}"])
    header = ["trained on all ten digits", "parameters", "AP of 0-7", "AP of 8 and 9", "AP of all"]
    header += ["bytes of the weights", "of the detector's", "AP of all, merged"]
    command = f"--base-epochs {epochs[0]} --epochs {epochs[1]} --jobs {jobs}"
    configs = [f"[{Path(config).stem}](../../{config})" for config in (BASE, LORA)]
    return "\n".join([
        "# Two new classes with LoRA", "",
        f"{made_by('lora_study', command, jobs)}. {configs[0]} trains for {epochs[0]} epochs, in whose pictures 8 and "
        f"9 are background; from its weights {configs[1]} trains for {epochs[1]} more with the boxes of all digits, "
        "and two others of its kind: with the layers that give the class scores alone, new for ten classes and trained "
        "in every row, and with nothing frozen. [How LoRA is used](../lora.md).", "",
        *table(header, rows), "",
        "AP is COCO's, of the 300 validation pictures, mean over the digits. Weights are those of "
        "`publish_model.py`, without the optimizer's state. One run of each, of a small detector on small pictures: it "
        "shows that the way works, and says nothing about COCO.", "",
    ])  # fmt: skip


def main() -> None:
    """Run what is missing, then write the page."""
    args = parse_args()
    if min(args.jobs, args.base_epochs, args.epochs) < 1:
        raise UserError("--jobs, --base-epochs and --epochs must be 1 or more")
    register_all_modules()
    torch.set_num_threads(1)
    work = args.work_dir.absolute()
    first = work / f"base_{args.base_epochs}-epochs"
    base = once(first, lambda: begin(first, args.base_epochs))
    checkpoint = first / f"epoch_{args.base_epochs}.pth"

    def task(name: str) -> dict:
        folder = first / f"{name.replace(' ', '-')}_{args.epochs}-epochs"
        return once(folder, lambda: go_on(name, checkpoint, folder, args.epochs))

    results = {}
    for name, found in side_by_side(task, VARIANTS, args.jobs):
        print(f"{name}: AP {found['old']:.1f} of 0-7, {found['new']:.1f} of 8 and 9", flush=True)
        results[name] = found
    args.out.write_text(page(base, results, (args.base_epochs, args.epochs), args.jobs))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
