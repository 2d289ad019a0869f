"""Train plain, LORST and LORSA vision transformers on scikit-learn's digits and write docs/classification_study.md.

Every run takes one CPU thread; several go side by side. A run that has finished is not repeated: the study can be
interrupted and called again.
"""

import argparse
from pathlib import Path
from statistics import mean

from options import add_study_options


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    add_study_options(parser, "classification_study")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from mmdet_lors.analysis.complexity import encoder_parameters
from mmdet_lors.analysis.study import (
    evaluate,
    last_epoch_only,
    link,
    made_by,
    once,
    read,
    side_by_side,
    table,
    train,
)
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

CONFIGS = {
    "plain": "configs/classification/vit_digits.py",
    "LORST": "configs/classification/vit-lors_digits.py",
    "LORSA per token": "configs/classification/vit-lors-adaptive_digits.py",
    "LORSA per image": "configs/classification/vit-lors-adaptive-mean_digits.py",
}


def train_and_test(name: str, seed: int, work: Path) -> dict:
    """One run, or what an earlier call found.

    Returns:
        Top-1 and top-5 accuracy of the last epoch in per cent, training time in seconds.
    """
    config = CONFIGS[name]
    folder, epochs = work / f"{Path(config).stem}_seed-{seed}", read(config).train_cfg.max_epochs

    def outcome() -> dict:
        seconds = train(config, folder, [f"randomness.seed={seed}", *last_epoch_only(epochs)])
        found = evaluate(config, folder / f"epoch_{epochs}.pth", folder)
        return dict(top1=found["accuracy/top1"], top5=found["accuracy/top5"], seconds=seconds)

    return once(folder, outcome)


def page(results: dict[str, list[dict]], jobs: int) -> str:
    """The study as Markdown.

    Args:
        results: per variant the outcomes of :func:`train_and_test`, by seed.
        jobs: how many ran side by side.
    """
    seeds = len(next(iter(results.values())))
    epochs = read(CONFIGS["plain"]).train_cfg.max_epochs
    spread = [max(r["top1"] for r in found) - min(r["top1"] for r in found) for found in results.values()]
    means = {name: mean(r["top1"] for r in found) for name, found in results.items()}
    differences = [f"{name} {value - means['plain']:+.2f}" for name, value in means.items() if name != "plain"]
    lines = [
        "# What LORS does in a vision transformer on scikit-learn's digits",
        "",
        f"{made_by('classification_study', f'--seeds {seeds} --jobs {jobs}', jobs)}, {epochs} epochs a run.",
        "",
    ]
    rows = []
    for name, found in results.items():
        cells = [name, link(CONFIGS[name]), f"{encoder_parameters(read(CONFIGS[name]).model):,}"]
        cells += [f"{means[name]:.2f}", ", ".join(f"{r['top1']:.2f}" for r in found)]
        rows.append([*cells, f"{mean(r['top5'] for r in found):.2f}"])
    lines += table(["variant", "config", "encoder parameters", "mean top-1, %", "each seed's", "mean top-5, %"], rows)
    lines += [
        "",
        f"Mean top-1 minus the plain model's, in points: {', '.join(differences)}. Seeds of one variant differ by up "
        f"to {max(spread):.2f} points.",
        "",
        "LORSA is [the attempt](share_stack.md#adaptive-weights) that the LORS paper's appendix A.2 proposes for "
        "Transformers, with LORST's groups and rank 3 in place of 8, so that it has no more parameters: each token, or "
        "the mean of an image's tokens, generates the cores E.",
        "",
        "**What this shows, and what it does not.** One image of the validation split is 0.28 points (355 images). "
        "The models are small and see 1,442 images of 8 x 8 pixels: this shows that the code trains, and says nothing "
        "about CIFAR-100 or ImageNet.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the page."""
    args = parse_args()
    if min(args.seeds, args.jobs) < 1:
        raise UserError("--seeds and --jobs must be 1 or more")

    work = args.work_dir.absolute()
    todo = [(name, seed) for seed in range(args.seeds) for name in CONFIGS]
    results: dict[str, list[dict]] = {name: [] for name in CONFIGS}
    for (name, seed), outcome in side_by_side(lambda item: train_and_test(*item, work), todo, args.jobs):
        print(f"{name} seed {seed}: top-1 {outcome['top1']:.2f} %, {outcome['seconds']:.0f} s", flush=True)
        results[name].append(outcome)
    args.out.write_text(page(results, args.jobs))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
