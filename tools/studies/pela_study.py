"""Compress and recover a small vision transformer on scikit-learn's digits and write docs/pela_study.md.

Per seed: train the plain model, factorise it, and train what is left with each of PELA's losses, with both and with
neither; with both at other ratios too. Every run takes one CPU thread; several go side by side. A run that has finished
is not repeated: the study can be interrupted and called again, and finds its plain models where classification_study.py
left them.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean

from options import add_study_options


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=12, help="of compression (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="after compression (default: %(default)s)")
    parser.add_argument("--teacher-epochs", type=int, help="of the plain model (default: its config's)")
    parser.add_argument(
        "--teachers",
        type=Path,
        default=Path("work_dirs/classification_study"),
        help="where classification_study.py trained its plain models, or this does (default: %(default)s)",
    )
    add_study_options(parser, "pela_study")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import torch
from mmdet.utils import register_all_modules
from pela_runs import (
    BOTH,
    COMPRESSED,
    DIRECT,
    DISTILLER,
    PLAIN,
    TEACHER,
    TRAINED,
    VARIANTS,
    Study,
    compressed_model,
    epochs_of,
    parameters,
)

from mmdet_lors.analysis.study import link, made_by, read, side_by_side, table
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

RATIOS = (2, 4, 8, 12, 16)
"""Those that are compared, beside the study's own."""

Results = Mapping[str, Sequence[Mapping]]
"""Per variant the outcomes of :class:`Study`'s runs, by seed."""


def compare(results: Results, column: int) -> tuple[list[list[str]], bool, bool]:
    """Table 7's order beside ours.

    Args:
        results: per variant the outcomes, by seed.
        column: of ``Variant.paper``.

    Returns:
        A row for each two neighbours in the paper's order: which is said to be better than which, the paper's
        difference, that of our means, each seed's, and what it says. Whether all means are in the paper's order, and
        whether every seed agrees with every pair.
    """
    ordered = sorted((v for v in VARIANTS if v.paper), key=lambda v: -v.paper[column])
    rows, in_order, every_seed = [], True, True
    for better, worse in pairwise(ordered):
        pairs = zip(results[better.name], results[worse.name], strict=True)
        # An image is 0.28 points: what rounding leaves must not decide.
        differences = [round(a["top1"] - b["top1"], 6) for a, b in pairs]
        ours = round(mean(differences), 6)
        verdict = "as in the paper" if ours > 0 else "equal" if ours == 0 else "the other way round"
        verdict += "; seeds disagree" if len({(d > 0) - (d < 0) for d in differences}) > 1 else ""
        in_order, every_seed = in_order and ours > 0, every_seed and min(differences) > 0
        theirs = better.paper[column] - worse.paper[column]
        seeds = ", ".join(f"{d:+.2f}" for d in differences)
        rows.append([f"{better.name} over {worse.name}", f"{theirs:+.2f}", f"{ours:+.2f}", seeds, verdict])
    return rows, in_order, every_seed


def page(by_ratio: Mapping[float, Results], study: Study, jobs: int) -> str:
    """The study as Markdown.

    Args:
        by_ratio: of each ratio, what was found; of the study's own, all variants.
        study: its settings.
        jobs: how many ran side by side.
    """
    results = by_ratio[study.ratio]
    seeds = len(results[TEACHER.name])
    plain = parameters(read(PLAIN).model)
    small = parameters(compressed_model(study.ratio))
    command = f"--seeds {seeds} --jobs {jobs} --ratio {study.ratio:g} --epochs {study.epochs}"
    command += f" --teacher-epochs {study.teacher_epochs}"
    lines = [
        "# What PELA recovers in a vision transformer on scikit-learn's digits",
        "",
        f"{made_by('pela_study', command, jobs)}. {link(PLAIN)} trains for {study.teacher_epochs} epochs; "
        f"{link(DISTILLER)} compresses it at ratio {study.ratio:g} and trains for {study.epochs} more; "
        f"{link(COMPRESSED)} evaluates what "
        "is left.",
        "",
    ]
    rows = []
    for variant in VARIANTS:
        found = results[variant.name]
        cells = [variant.name, variant.what, f"{plain if variant is TEACHER else small:,}"]
        cells += [f"{mean(r['top1'] for r in found):.2f}", ", ".join(f"{r['top1']:.2f}" for r in found)]
        cells += [f"{mean(r['top5'] for r in found):.2f}", seconds(found, "seconds")]
        rows.append([*cells, *(f"{value:.2f}" for value in variant.paper or ())] + [""] * (0 if variant.paper else 2))
    header = ["variant", "", "parameters", "mean top-1, %", "each seed's", "mean top-5, %", "mean time, s"]
    lines += table([*header, "DeiT-B (paper)", "Swin-B (paper)"], rows)
    trained = [[r["top1"] for r in results[variant.name]] for variant in (TEACHER, *TRAINED)]
    spread = max(max(found) - min(found) for found in trained)
    lines += [
        "",
        "Time is that of training, or of the factorisation where there is no training. The paper's columns are top-1 "
        "on ImageNet from its Table 7. It has no row for the base loss alone; without one, what the two losses "
        "add cannot be told from what training adds.",
        "",
        *ratios(by_ratio, study),
        "## The order of the paper's Table 7",
        "",
    ]
    for column, model in enumerate(("DeiT-Base", "Swin-Base")):
        rows, in_order, every_seed = compare(results, column)
        lines += [
            f"Our means are {'' if in_order else '**not** '}in the order of {model}'s column"
            + (", and so is every seed." if every_seed else ", but not every seed is." if in_order else "."),
            "",
            *table(["pair, the paper's better one first", "paper", "ours", "each seed's", ""], rows),
            "",
        ]
    lines += [
        "Differences are in points of top-1. One image of the validation split is 0.28 points (355 images); seeds of "
        f"one trained variant differ by up to {spread:.2f} points. A pair whose seeds disagree, or that differs by a "
        "few images, says nothing about an order. Which row of Table 7 has which of the two losses is read from the "
        "order of its columns.",
        "",
        *sizes(results),
        *recipe(results, study),
        "**What this shows, and what it does not.** The models are small and see 1,442 images of 8 x 8 pixels: this "
        "shows that the recipe works from end to end, and says nothing about ImageNet.",
        "",
    ]
    return "\n".join(lines)


def ratios(by_ratio: Mapping[float, Results], study: Study) -> list[str]:
    """The paper's Figure 4: what each ratio costs, without training and after it."""
    plain = mean(r["top1"] for r in by_ratio[study.ratio][TEACHER.name])
    rows, lost = [], {}
    for ratio, results in by_ratio.items():
        direct, both = ([r["top1"] for r in results[name]] for name in (DIRECT.name, BOTH.name))
        lost[ratio] = plain - mean(direct)
        each = ", ".join(f"{value:.2f}" for value in both)
        rows.append([f"{ratio:g}", f"{parameters(compressed_model(ratio)):,}", f"{mean(direct):.2f}",
                     f"{mean(both):.2f}", each, f"{mean(both) - plain:+.2f}"])  # fmt: skip
    return [
        "## The ratio (the paper's Figure 4)",
        "",
        *table(["ratio", "parameters", "factorised", "trained with both losses", "each seed's", "to plain"], rows),
        "",
        "The paper's figure shows, for ImageNet and fewer epochs, that a smaller ratio is better and a tenth of the "
        f"size too little. Ratio {study.ratio:g} is the one above because factorising costs {lost[study.ratio]:.2f} "
        f"points there, and only {lost[min(lost)]:.2f} at {min(lost):g}; the paper's DeiT-Base loses 20.72. Where "
        "little is lost, no recovery can be seen.",
        "",
    ]


def sizes(results: Results) -> list[str]:
    """How much there is of each loss, and which variants cannot be told apart."""
    found = [r["losses"] for r in results["both"]]
    labels = {"loss": "base loss", "loss_feature": "feature distillation", "loss_perturbation": "weight perturbation"}
    rows = [[label, *(f"{mean(r[name][i] for r in found):.4f}" for i in (0, 1))] for name, label in labels.items()]
    same = [
        f"`{a.name}` and `{b.name}`"
        for a, b in combinations(TRAINED, 2)
        if all(x["top1"] == y["top1"] for x, y in zip(results[a.name], results[b.name], strict=True))
    ]
    return [
        "## How large the losses are",
        "",
        "Of the variant `both`, with the configs' weights of 1, mean over seeds:",
        "",
        *table(["loss", "after the first epoch", "after the last"], rows),
        "",
        *([f"The same top-1 for every seed have {', '.join(same)}.", ""] if same else []),
    ]


def recipe(results: Results, study: Study) -> list[str]:
    """The same by hand, with the times of seed 0 above."""
    first, both = results[TEACHER.name][0], results["both"][0]
    times = [first["seconds"], both["seconds"], both["extract"], both["test"]]
    ratio = f"--cfg-options model.ratio={study.ratio:g}"
    return [
        "## The whole recipe by hand",
        "",
        "Pre-train, compress and distil, extract, evaluate. The data are inside scikit-learn; a CPU is enough.",
        "",
        "```bash",
        f"python tools/train.py {PLAIN}",
        f"python tools/train.py {DISTILLER} {ratio}",
        f"python tools/model_converters/extract_student.py "
        f"work_dirs/{Path(DISTILLER).stem}/epoch_{epochs_of(DISTILLER)}.pth student.pth",
        f"python tools/test.py {COMPRESSED} student.pth {ratio}",
        "```",
        "",
        f"In the runs above, seed 0 of these four took {', '.join(f'{t:.0f}' for t in times)} s, {sum(times):.0f} s in "
        f"all, with {study.teacher_epochs} and {study.epochs} epochs.",
        "",
    ]


def seconds(found: Sequence[Mapping], stage: str) -> str:
    """Mean time of a stage; short ones in more digits."""
    value = mean(r[stage] for r in found)
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    """Run what is missing, then write the page."""
    args = parse_args()
    if min(args.seeds, args.jobs) < 1:
        raise UserError("--seeds and --jobs must be 1 or more")
    if args.teacher_epochs is None:
        args.teacher_epochs = epochs_of(PLAIN)
    if min(args.epochs, args.teacher_epochs) < 2:
        raise UserError("--epochs and --teacher-epochs must be 2 or more: the first one warms up")
    register_all_modules()
    torch.set_num_threads(1)
    study = Study(args.ratio, args.epochs, args.teacher_epochs, args.work_dir.absolute(), args.teachers.absolute())
    parameters(compressed_model(args.ratio))  # A ratio that cannot work shows now.

    by_ratio: dict[float, dict[str, list[dict]]] = {ratio: {} for ratio in sorted({*RATIOS, study.ratio})}
    teachers = [(study, TEACHER, seed) for seed in range(args.seeds)]
    rest = [
        (replace(study, ratio=ratio), variant, seed)
        for seed in range(args.seeds)
        for ratio in by_ratio
        for variant in ([DIRECT, *TRAINED] if ratio == study.ratio else [DIRECT, BOTH])
    ]
    for batch in (teachers, rest):
        for (at, variant, seed), outcome in side_by_side(lambda r: r[0].run(*r[1:]), batch, args.jobs):
            line = f"{variant.name}, ratio {at.ratio:g}, seed {seed}: top-1 {outcome['top1']:.2f} %"
            print(f"{line}, {outcome['seconds']:.0f} s", flush=True)
            by_ratio[at.ratio].setdefault(variant.name, []).append(outcome)
    args.out.write_text(page(by_ratio, study, args.jobs))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
