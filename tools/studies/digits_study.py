"""Train the variants of AdaMixer and LORS on the embedded digits and write docs/digits_study.md and its plot.

Every run takes the same number of iterations and one CPU thread; several go side by side. A run that has finished
is not repeated: the study can be interrupted and called again.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_lors.analysis.complexity import build_on_meta
from mmdet_lors.analysis.study import add_study_options, call, evaluate, made_by, once, side_by_side, table, train
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

ROOT = Path(__file__).parents[2]
PLAIN = "configs/adamixer/adamixer_r18_digits.py"
LORS = "configs/lors/adamixer-lors_r18_digits.py"


@dataclass(frozen=True)
class Variant:
    """One row of the study."""

    name: str
    what: str
    config: str = LORS
    options: dict = field(default_factory=dict)
    """Overrides below model.decoder."""
    seeds: tuple[int, ...] = (0,)
    warm_start: str = ""
    """Name of the plain variant whose weights it starts from."""

    def cfg_options(self) -> list[str]:
        """The overrides as --cfg-options takes them."""
        return [f"model.decoder.{key}={value}" for key, value in self.options.items()]


ADAPTIVE, STATIC = "lors.adaptive.", "lors.static."
VARIANTS = [
    Variant("plain-4x8", "plain, 4 groups of 8 points", PLAIN, {"stage.num_groups": 4, "stage.in_points": 8}),
    Variant("plain-2x16", "plain, 2 groups of 16 points", PLAIN, seeds=(0, 1)),
    Variant("lors", "LORS: LORSA of rank 8, groups 1, 1, 2; LORST of rank 8", seeds=(0, 1)),
    Variant("lorsa-only", "LORSA alone", options={"lors.static": None}),
    Variant("lorst-only", "LORST alone", options={"lors.adaptive": None}),
    Variant("shared-only", "no private part in LORSA", options={ADAPTIVE + "groups": 0}),
    Variant("private-only", "no shared part in LORSA", options={ADAPTIVE + "shared": False}),
    Variant("lors-r4", "LORSA of rank 4, groups 1, 1, 1", options={ADAPTIVE + "rank": 4, ADAPTIVE + "groups": 1}),
    Variant("lors-r16", "LORSA of rank 16, groups 1, 1, 2", options={ADAPTIVE + "rank": 16}),
    Variant("lors-warm", "LORS, started from the trained plain-2x16", warm_start="plain-2x16"),
]


def train_and_test(variant: Variant, seed: int, work: Path, epochs: int) -> dict:
    """One run, or what an earlier call found.

    Returns:
        AP and AP50 of the last epoch, training time in seconds.
    """
    folder = work / f"{variant.name}_seed-{seed}"
    options = [*variant.cfg_options(), f"randomness.seed={seed}"]
    schedule = [f"train_cfg.max_epochs={epochs}", f"train_cfg.val_interval={epochs + 1}"]
    schedule += [f"param_scheduler.1.T_max={epochs}", f"param_scheduler.1.end={epochs}"]

    def outcome() -> dict:
        if variant.warm_start:
            source, start = work / f"{variant.warm_start}_seed-{seed}" / f"epoch_{epochs}.pth", folder / "start.pth"
            convert = ["tools/model_converters/adamixer_to_lors.py", PLAIN, str(source), variant.config, str(start)]
            call(*convert, log=folder / "log.txt")
            schedule.append(f"load_from={start}")
        seconds = train(variant.config, folder, [*options, *schedule])
        found = evaluate(variant.config, folder / f"epoch_{epochs}.pth", folder, options)
        return dict(ap=found["coco/bbox_mAP"], ap50=found["coco/bbox_mAP_50"], seconds=seconds)

    return once(folder, outcome)


def decoder_parameters(variant: Variant) -> int:
    """Counted from what the variant builds."""
    cfg = Config.fromfile(ROOT / variant.config)
    cfg.merge_from_dict({f"model.decoder.{key}": value for key, value in variant.options.items()})
    return sum(p.numel() for p in build_on_meta(cfg.model).decoder.parameters())


def plot(rows: list[tuple[Variant, int, list[dict]]], path: Path) -> None:
    """AP over decoder parameters, one point a run."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for variant, parameters, runs in rows:
        colour = "tab:blue" if variant.config == PLAIN else "tab:orange"
        axes.scatter([parameters / 1e6] * len(runs), [r["ap"] for r in runs], color=colour, zorder=2)
        where = (parameters / 1e6, max(r["ap"] for r in runs))
        axes.annotate(variant.name, where, textcoords="offset points", xytext=(6, 3), fontsize=9)
    axes.set(xlabel="decoder parameters, millions", ylabel="AP on the digits' val split")
    axes.grid(alpha=0.3, zorder=1)
    axes.margins(x=0.15, y=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def page(rows: list[tuple[Variant, int, list[dict]]], epochs: int, jobs: int, picture: str, note: str) -> str:
    """The study as Markdown."""
    runs = sum(len(found) for _, _, found in rows)
    lines = [
        "# What LORS does on the embedded digits",
        "",
        f"{made_by('digits_study', f'--epochs {epochs} --jobs {jobs}', jobs)}; {runs} runs of {epochs} epochs, "
        f"{sum(r['seconds'] for _, _, found in rows for r in found) / 3600:.1f} hours of training in all. "
        f"{note}".rstrip(),
        "",
    ]
    cells = []
    for variant, parameters, found in rows:
        aps = ", ".join(f"{r['ap']:.3f}" for r in found)
        means = f"{mean(r['ap50'] for r in found):.3f}", f"{mean(r['seconds'] for r in found):.0f}"
        cells.append([variant.name, variant.what, f"{parameters:,}", aps, *means])
    lines += table(["variant", "", "decoder parameters", "AP (seed 0, seed 1)", "AP50", "training, s"], cells)
    lines += [
        "",
        f"![AP over decoder parameters]({picture})",
        "",
        "AP50 and training time are means over seeds. Times are by the clock: what else the machine did is in them. "
        "The warm start has been trained twice as long as the others, for it starts from weights fitted to the trained "
        "plain model; its time is that of its own training alone.",
        "",
        "**What this shows, and what it does not.** These are small models (3 stages, 64 channels, 20 queries), "
        "trained for minutes from scratch on 2,000 pictures of 96 pixels, one or two seeds each. Most of that time "
        "goes into learning features at all, so that the AP measures how fast a variant learns rather than where it "
        "ends. The two seeds of the main pair show how large a difference has to be before it means anything. Nothing "
        "here is evidence about COCO, where the decoder is 30 times larger, the backbone is pre-trained and training "
        "lasts days.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="epochs of every run (default: %(default)s)")
    add_study_options(parser, "digits_study")
    parser.add_argument("--note", default="", help="a sentence for the page, on how it was run")
    args = parser.parse_args()
    if min(args.epochs, args.jobs) < 1:
        raise UserError("--epochs and --jobs must be 1 or more")
    if not (ROOT / "data/digits/annotations/val.json").is_file():
        raise UserError("data/digits does not exist; make it with: python tools/dataset_converters/digits_to_coco.py")

    register_all_modules()
    work = args.work_dir.absolute()
    todo = [(variant, seed) for variant in VARIANTS for seed in variant.seeds]
    results: dict[tuple[str, int], dict] = {}
    for warm in (False, True):
        batch = [(v, s) for v, s in todo if bool(v.warm_start) == warm]
        for (variant, seed), outcome in side_by_side(
            lambda item: train_and_test(*item, work, args.epochs), batch, args.jobs
        ):
            print(f"{variant.name} seed {seed}: AP {outcome['ap']:.3f}, {outcome['seconds']:.0f} s", flush=True)
            results[variant.name, seed] = outcome
    rows = [(v, decoder_parameters(v), [results[v.name, s] for s in v.seeds]) for v in VARIANTS]
    picture = args.out.with_suffix(".png")
    plot(rows, picture)
    args.out.write_text(page(rows, args.epochs, args.jobs, picture.name, args.note))
    print(f"wrote {args.out} and {picture}")


if __name__ == "__main__":
    run(main)
