"""Compress and recover a small vision transformer on scikit-learn's digits and write docs/pela_study.md.

Per seed: train the plain model, factorise it, and train what is left with each of PELA's losses, with both and with
neither. Every run takes one CPU thread; several go side by side. A run that has finished is not repeated: the study can
be interrupted and called again, and finds its plain models where classification_study.py left them.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdet_lors.analysis.study import (
    add_study_options,
    call,
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
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.reading import read_checkpoint, write_checkpoint
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

PLAIN = "configs/classification/vit_digits.py"
DISTILLER = "configs/pela/pela-distiller_vit_digits.py"
COMPRESSED = "configs/pela/pela_vit_digits.py"
RATIOS = (2, 4, 8, 12, 16)
"""At which direct factorisation is measured, to choose one."""


@dataclass(frozen=True)
class Variant:
    """One row of the study."""

    name: str
    what: str
    losses: tuple[str, ...] | None = None
    """PELA's losses that it trains with, besides the base loss; None is not trained after compression."""
    paper: tuple[float, float] | None = None
    """Top-1 of DeiT-Base and Swin-Base on ImageNet, per cent; None where the paper's Table 7 has no such row."""

    def options(self) -> list[str]:
        """--cfg-options that switch the other losses off."""
        return [f"model.{loss}_loss=None" for loss in ("feature", "perturbation") if loss not in self.losses]


TEACHER = Variant("plain", "the teacher, not compressed", paper=(81.80, 83.50))
DIRECT = Variant("compressed", "factorised, no further training", paper=(61.08, 77.60))
TRAINED = [
    Variant("base loss", "trained with the classifier's loss alone", ()),
    Variant("feature", "and feature distillation", ("feature",), (80.90, 82.89)),
    Variant("perturbation", "and weight perturbation", ("perturbation",), (80.55, 82.86)),
    Variant("both", "and both", ("feature", "perturbation"), (80.96, 82.54)),
]
VARIANTS = [TEACHER, DIRECT, *TRAINED]


@dataclass(frozen=True)
class Study:
    """Its settings, and where its runs are."""

    ratio: float
    epochs: int
    teacher_epochs: int
    work: Path
    teachers: Path
    """A folder of classification_study.py, whose plain models serve when they trained as long."""

    def teacher_folder(self, seed: int) -> Path:
        """Of the plain model of this seed."""
        same = self.teacher_epochs == epochs_of(PLAIN)
        return (self.teachers if same else self.work / f"{self.teacher_epochs}-epochs") / f"vit_digits_seed-{seed}"

    def folder(self, variant: Variant, seed: int) -> Path:
        """Of one run; another ratio or length has another."""
        settings = f"ratio-{self.ratio:g}_{self.teacher_epochs}-epochs"
        settings += f"_{self.epochs}-epochs" if variant.losses is not None else ""
        return self.work / settings / f"{variant.name.replace(' ', '-')}_seed-{seed}"

    def teach(self, seed: int) -> dict:
        """Train and evaluate a plain model.

        Returns:
            ``top1`` and ``top5`` in per cent, ``seconds`` of training.
        """
        folder = self.teacher_folder(seed)

        def work() -> dict:
            seconds = train(PLAIN, folder, schedule(PLAIN, self.teacher_epochs, seed))
            return accuracy(evaluate(PLAIN, self.teacher(seed), folder)) | dict(seconds=seconds)

        return once(folder, work)

    def teacher(self, seed: int) -> Path:
        """Checkpoint of the plain model."""
        return self.teacher_folder(seed) / f"epoch_{self.teacher_epochs}.pth"

    def compress(self, seed: int) -> dict:
        """Factorise a plain model and evaluate what is left.

        Returns:
            ``top1`` and ``top5`` in per cent, ``seconds`` of the factorisation; ``by_ratio``, top-1 at other ratios.
        """
        folder = self.folder(DIRECT, seed)

        def work() -> dict:
            checkpoint = folder / "compressed.pth"
            weights = read_checkpoint(self.teacher(seed))["state_dict"]
            begin = time.monotonic()
            model = factorised(weights, self.ratio)
            seconds = time.monotonic() - begin
            write_checkpoint(dict(meta={}, state_dict=model.state_dict()), checkpoint)
            found = accuracy(evaluate(COMPRESSED, checkpoint, folder, self.settings()))
            by_ratio = {f"{ratio:g}": top1(factorised(weights, ratio)) for ratio in sorted({*RATIOS, self.ratio})}
            return found | dict(seconds=seconds, by_ratio=by_ratio)

        return once(folder, work)

    def recover(self, variant: Variant, seed: int) -> dict:
        """Train a compressed model, take it out of the distiller and evaluate it.

        Returns:
            ``top1`` and ``top5`` in per cent, ``seconds`` of training, ``extract`` and ``test`` in seconds; ``losses``,
            the first and the last epoch's.
        """
        folder = self.folder(variant, seed)

        def work() -> dict:
            options = [*self.settings(), *variant.options(), f"model.teacher_checkpoint={self.teacher(seed)}"]
            seconds = train(DISTILLER, folder, [*options, *schedule(DISTILLER, self.epochs, seed)])
            student, begin = folder / "student.pth", time.monotonic()
            source = str(folder / f"epoch_{self.epochs}.pth")
            call("tools/model_converters/extract_student.py", source, str(student), log=folder / "log.txt")
            extracted = time.monotonic()
            found = accuracy(evaluate(COMPRESSED, student, folder, self.settings()))
            times = dict(seconds=seconds, extract=extracted - begin, test=time.monotonic() - extracted)
            return found | times | dict(losses=first_and_last_losses(folder))

        return once(folder, work)

    def settings(self) -> list[str]:
        """--cfg-options of compression."""
        return [f"model.ratio={self.ratio:g}"]


def epochs_of(config: str) -> int:
    """How long a config trains by itself."""
    return read(config).train_cfg.max_epochs


def schedule(config: str, epochs: int, seed: int) -> list[str]:
    """--cfg-options of a run's seed and length; warm-up and decay keep their shares of it."""
    cfg = read(config)
    warmup = max(1, round(epochs * cfg.param_scheduler[0].end / cfg.train_cfg.max_epochs))
    options = [f"randomness.seed={seed}", f"train_cfg.max_epochs={epochs}", *last_epoch_only(epochs)]
    options += [f"param_scheduler.0.end={warmup}", f"param_scheduler.1.begin={warmup}"]
    return [*options, f"param_scheduler.1.end={epochs}", f"param_scheduler.1.T_max={epochs - warmup}"]


def compressed_model(ratio: float) -> dict:
    """The config of the compressed classifier."""
    return dict(deepcopy(read(COMPRESSED).model), ratio=ratio)


def factorised(weights: Mapping[str, Tensor], ratio: float) -> nn.Module:
    """The compressed classifier, filled with the plain one's weights."""
    model = MODELS.build(compressed_model(ratio))
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module) -> float:
    """Of the validation split, per cent, in this process."""
    loader = dict(deepcopy(read(PLAIN).val_dataloader), num_workers=0, persistent_workers=False)
    found = [sample for batch in Runner.build_dataloader(loader) for sample in model.val_step(batch)]
    return 100 * mean(sample["scores"].argmax().item() == sample["label"] for sample in found)


def first_and_last_losses(folder: Path) -> dict[str, tuple[float, float]]:
    """What training logged at the end of its first and of its last epoch, by the losses' names."""
    newest = max(folder.glob("*/vis_data/scalars.json"))
    logged = [line for line in map(json.loads, newest.read_text().splitlines()) if "loss" in line]
    return {name: (value, logged[-1][name]) for name, value in logged[0].items() if name.startswith("loss")}


def accuracy(metrics: Mapping) -> dict:
    """Top-1 and top-5, per cent."""
    return dict(top1=metrics["accuracy/top1"], top5=metrics["accuracy/top5"])


def compare(results: Mapping[str, Sequence[Mapping]], column: int) -> tuple[list[list[str]], bool, bool]:
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


def page(results: Mapping[str, Sequence[Mapping]], study: Study, jobs: int) -> str:
    """The study as Markdown.

    Args:
        results: per variant the outcomes of :class:`Study`'s runs, by seed.
        study: its settings.
        jobs: how many ran side by side.
    """
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
        *why_this_ratio(results, study),
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


def why_this_ratio(results: Mapping[str, Sequence[Mapping]], study: Study) -> list[str]:
    """What direct factorisation costs at other ratios."""
    found = [r["by_ratio"] for r in results[DIRECT.name]]
    means = {ratio: mean(r[ratio] for r in found) for ratio in found[0]}
    plain = mean(r["top1"] for r in results[TEACHER.name])
    return [
        f"**Why ratio {study.ratio:g}.** Factorised without further training, the same models have this top-1, %:",
        "",
        *table(["ratio", *means], [["mean", *(f"{value:.2f}" for value in means.values())]]),
        "",
        f"At the configs' ratio of 2 that costs {plain - means['2']:.2f} points, at the ratio here "
        f"{plain - means[f'{study.ratio:g}']:.2f}; the paper's DeiT-Base loses 20.72. Where little is lost, no "
        "recovery can be seen.",
        "",
    ]


def sizes(results: Mapping[str, Sequence[Mapping]]) -> list[str]:
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


def recipe(results: Mapping[str, Sequence[Mapping]], study: Study) -> list[str]:
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


def parameters(model_cfg: dict) -> int:
    """Of the whole classifier."""
    return sum(p.numel() for p in build_without_weights(model_cfg).parameters())


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=12, help="of compression (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="after compression (default: %(default)s)")
    parser.add_argument(
        "--teacher-epochs", type=int, default=epochs_of(PLAIN), help="of the plain model (default: %(default)s)"
    )
    parser.add_argument(
        "--teachers",
        type=Path,
        default=Path("work_dirs/classification_study"),
        help="where classification_study.py trained its plain models, or this does (default: %(default)s)",
    )
    add_study_options(parser, "pela_study")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write the page."""
    args = parse_args()
    if min(args.seeds, args.jobs) < 1:
        raise UserError("--seeds and --jobs must be 1 or more")
    if min(args.epochs, args.teacher_epochs) < 2:
        raise UserError("--epochs and --teacher-epochs must be 2 or more: the first one warms up")
    register_all_modules()
    torch.set_num_threads(1)
    study = Study(args.ratio, args.epochs, args.teacher_epochs, args.work_dir.absolute(), args.teachers.absolute())
    parameters(compressed_model(args.ratio))  # A ratio that cannot work shows now.

    seeds = range(args.seeds)
    steps = [(TEACHER, seed, partial(study.teach, seed)) for seed in seeds]
    rest = [(variant, seed, partial(study.recover, variant, seed)) for seed in seeds for variant in TRAINED]
    rest += [(DIRECT, seed, partial(study.compress, seed)) for seed in seeds]
    results: dict[str, list[dict]] = {variant.name: [] for variant in VARIANTS}
    for batch in (steps, rest):
        for (variant, seed, _), outcome in side_by_side(lambda step: step[2](), batch, args.jobs):
            line = f"{variant.name} seed {seed}: top-1 {outcome['top1']:.2f} %, {outcome['seconds']:.0f} s"
            print(line, flush=True)
            results[variant.name].append(outcome)
    args.out.write_text(page(results, study, args.jobs))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
