"""Compress a trained classifier and a trained detector three ways and write docs/measured/compression_study.md.

Per model, seed and ratio: factors of the weights (plain SVD), factors of the outputs, and these with a budget of the
same number of parameters instead of one ratio; each before training and after a few epochs of it. All of it by
tools/model_converters/compress.py and the other tools. A run that has finished is not repeated: the study can be
interrupted and called again.
"""

import argparse
from pathlib import Path

from options import add_study_options


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, default=(3, 3), metavar=("CLASSIFIERS", "DETECTORS"),
                        help="plain models of each kind (default: 3 3)")  # fmt: skip
    parser.add_argument("--recovery", type=int, default=5, metavar="EPOCHS", help="(default: %(default)s)")
    parser.add_argument("--recover", type=int, nargs=2, metavar=("CLASSIFIERS", "DETECTORS"),
                        help="plain models whose compressed ones are trained (default: all)")  # fmt: skip
    names = ["classifier", "detector"]
    parser.add_argument("--models", nargs="+", default=names, choices=names, help="(default: both)")
    add_study_options(parser, "compression_study", "measured")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from statistics import mean

from matplotlib.figure import Figure

from mmdet_lors.analysis.study import (
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
from mmdet_lors.engine.checkpoint.reading import read_checkpoint
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

WAYS = {
    "plain SVD": "factors of the weights, one ratio",
    "calibrated": "factors of the outputs, one ratio",
    "calibrated, budget": "factors of the outputs, ranks by the loss, as many parameters",
}


@dataclass(frozen=True)
class Subject:
    """A model that is compressed."""

    name: str
    config: str
    ratios: tuple[int, ...]
    options: tuple[str, ...]
    """Of compress.py."""
    metric: str
    label: str
    digits: int
    """Of the metric, after the point."""
    rate: float
    """Of learning, in recovery."""


SUBJECTS = [
    Subject(
        "classifier", "configs/classification/vit_digits.py", (2, 4, 8, 12), (), "accuracy/top1", "top-1, %", 2, 5e-4
    ),
    Subject(
        "detector",
        "configs/lors/adamixer-lors_r18_digits.py",
        (2, 3, 4),
        ("--convolutions", "--omit", "norm", "out_proj", "sampling", "cls_branch", "reg_branch"),
        "coco/bbox_mAP",
        "AP",
        3,
        1e-4,
    ),
]


@dataclass(frozen=True)
class Study:
    """Its settings."""

    recovery: int
    """Epochs of it."""
    recover: Mapping[str, int]
    """By model, how many seeds have it."""
    work: Path

    def plain(self, subject: Subject, seed: int) -> dict:
        """Train a plain model.

        Returns:
            ``metric`` and ``parameters``.
        """
        folder = self.work / f"{subject.name}_seed-{seed}"

        def work() -> dict:
            epochs = read(subject.config).train_cfg.max_epochs
            train(subject.config, folder, [f"randomness.seed={seed}", *last_epoch_only(epochs)])
            found = evaluate(subject.config, self.checkpoint(subject, seed), folder)
            return dict(metric=found[subject.metric], parameters=size(self.checkpoint(subject, seed)))

        return once(folder, work)

    def checkpoint(self, subject: Subject, seed: int) -> Path:
        """Of the plain model."""
        epochs = read(subject.config).train_cfg.max_epochs
        return self.work / f"{subject.name}_seed-{seed}" / f"epoch_{epochs}.pth"

    def compressed(self, subject: Subject, seed: int, ratio: int, way: str) -> dict:
        """Compress a plain model, evaluate it, train it, and evaluate it again.

        Returns:
            ``metric``, ``parameters`` and, if it is trained, ``recovered``.
        """
        epochs = self.recovery if seed < self.recover[subject.name] else 0
        folder = self.work / f"{subject.name}_seed-{seed}_ratio-{ratio}_{way.replace(', ', '-').replace(' ', '-')}"
        folder = folder.with_name(f"{folder.name}_{epochs}-epochs")

        def work() -> dict:
            how = ["--ratio", str(ratio)]
            if way == "calibrated, budget":
                how = ["--params", str(self.compressed(subject, seed, ratio, "plain SVD")["parameters"])]
            out = folder / "small.pth"
            command = [subject.config, str(self.checkpoint(subject, seed)), str(out), *how, *subject.options]
            command += ["--images", "0"] if way == "plain SVD" else []
            call("tools/model_converters/compress.py", *command, log=folder / "log.txt")
            config = str(out.with_suffix(".py"))
            before = evaluate(config, out, folder)[subject.metric]
            found = dict(metric=before, parameters=size(out))
            if not epochs:
                return found
            options = [f"load_from={out}", f"randomness.seed={seed}", f"train_cfg.max_epochs={epochs}"]
            options += [f"optim_wrapper.optimizer.lr={subject.rate}", *last_epoch_only(epochs)]
            options += short_schedule(subject.config, epochs)
            recovery = folder / "recovery"
            recovery.mkdir(exist_ok=True)
            train(config, recovery, options)
            after = evaluate(config, recovery / f"epoch_{epochs}.pth", recovery)
            return found | dict(recovered=after[subject.metric])

        return once(folder, work)


def short_schedule(config: str, epochs: int) -> list[str]:
    """Options with which a config's schedule takes so many epochs; a warm-up of epochs takes one."""
    warm_up = int(read(config).param_scheduler[0].get("by_epoch", True))
    options = ["param_scheduler.0.end=1", "param_scheduler.1.begin=1"] if warm_up else []
    return [*options, f"param_scheduler.1.end={epochs}", f"param_scheduler.1.T_max={epochs - warm_up}"]


def size(checkpoint: Path) -> int:
    """Parameters of a model, its norms' statistics included."""
    return sum(value.numel() for value in read_checkpoint(checkpoint)["state_dict"].values())


Found = dict[tuple, dict]
"""Results by (subject's name, seed) and (subject's name, seed, ratio, way)."""


def sides(found: Found, subject: Subject, seeds: int) -> Iterator[tuple[int, str, list[dict]]]:
    """Every ratio and way, and its results by seed."""
    for ratio, way in product(subject.ratios, WAYS):
        yield ratio, way, [found[subject.name, seed, ratio, way] for seed in range(seeds)]


def section(found: Found, subject: Subject, seeds: int, recovery: int) -> list[str]:
    """One model's table, as Markdown."""

    def cells(results: list[dict], field: str) -> list[str]:
        values = [r[field] for r in results if field in r]
        return [f"{mean(values):.{subject.digits}f}", ", ".join(f"{value:.{subject.digits}f}" for value in values)]

    plain = [found[subject.name, seed] for seed in range(seeds)]
    header = ["ratio", "", "parameters", subject.label, "each seed's"]
    header += [f"after {recovery} epochs", "each seed's"] if recovery else []
    rows = [["", "not compressed", f"{plain[0]['parameters']:,}", *cells(plain, "metric"), *([""] * len(header[5:]))]]
    for ratio, way, results in sides(found, subject, seeds):
        row = [f"{ratio}", way, f"{mean(r['parameters'] for r in results):,.0f}", *cells(results, "metric")]
        rows.append(row + (cells(results, "recovered") if recovery else []))
    options = f", `{' '.join(subject.options)}`" if subject.options else ""
    return [f"## The {subject.name}", "", f"{link(subject.config, '../../')}{options}.", "", *table(header, rows), ""]


def plot(found: Found, seeds: Mapping[Subject, int], picture: Path) -> None:
    """The metric over the parameters, without training (lines) and after it (dashed)."""
    figure = Figure(figsize=(5.5 * len(seeds), 4), layout="constrained")
    for ax, (subject, number) in zip(figure.subplots(1, len(seeds), squeeze=False)[0], seeds.items(), strict=True):
        for colour, way in zip(("tab:gray", "tab:blue", "tab:red"), WAYS, strict=True):
            points = [results for _, name, results in sides(found, subject, number) if name == way]
            x = [mean(r["parameters"] for r in results) / 1e6 for results in points]
            for field, style in (("metric", "o-"), ("recovered", "s--")):
                if field not in points[0][0]:
                    continue
                y = [mean(r[field] for r in results if field in r) for results in points]
                ax.plot(x, y, style, color=colour, label=way if field == "metric" else None)
        ax.axhline(mean(found[subject.name, seed]["metric"] for seed in range(number)), color="black", lw=1, ls=":")
        ax.set(xlabel="parameters, M", ylabel=subject.label, title=subject.name)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(WAYS))
    figure.savefig(picture, dpi=120)


def page(found: Found, seeds: Mapping[Subject, int], study: Study, command: str, jobs: int) -> str:
    """The study as Markdown."""
    trained = [f"{min(n, study.recover[s.name])} of {n} {s.name}s" for s, n in seeds.items() if study.recover[s.name]]
    recovery = f"{study.recovery} epochs, of {' and '.join(trained)}" if trained else "none"
    lines = [
        "# What data and a budget add to low rank",
        "",
        f"{made_by('compression_study', command, jobs)}. [compression.md](../compression.md) has the equations.",
        "",
        *table(["way", ""], [[way, what] for way, what in WAYS.items()]),
        "",
        "Parameters count the norms' statistics too; a budget does not, and may be larger by them. 256 training images "
        "are used for the outputs and the ranks. "
        f"Recovery is the config's own training from the compressed model, without a teacher: {recovery}. The models "
        "that are not compressed were not trained on: what a compressed one has more than they is from those epochs.",
        "",
        "![accuracy over parameters](compression_study.png)",
        "",
        "Solid: without any training. Dashed: after recovery. Dotted: not compressed.",
        "",
    ]
    for subject, number in seeds.items():
        lines += section(found, subject, number, study.recovery if study.recover[subject.name] else 0)
    lines += [
        "**What this shows, and what it does not.** The models and their data are small; it says nothing about COCO or "
        "ImageNet.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write page and figure."""
    args = parse_args()
    if min(*args.seeds, args.jobs) < 1:
        raise UserError("--seeds and --jobs must be 1 or more")
    if args.recovery < 2:
        raise UserError("--recovery must be 2 or more: the first epoch warms up")
    recover = args.recover or args.seeds
    names = [subject.name for subject in SUBJECTS]
    study = Study(args.recovery, dict(zip(names, recover, strict=True)), args.work_dir.absolute())
    seeds = {s: number for s, number in zip(SUBJECTS, args.seeds, strict=True) if s.name in args.models}
    plain = [(subject, seed) for subject, number in seeds.items() for seed in range(number)]
    # Plain SVD first: it says how many parameters the budget has.
    firsts = [(s, seed, ratio, "plain SVD") for s, seed in plain for ratio in s.ratios]
    rest = [(s, seed, ratio, way) for s, seed, ratio, _ in firsts for way in list(WAYS)[1:]]
    found: Found = {}
    for batch, work in ((plain, study.plain), (firsts, study.compressed), (rest, study.compressed)):
        for key, outcome in side_by_side(lambda key, work=work: work(*key), batch, args.jobs):
            named = (key[0].name, *key[1:])
            found[named] = outcome
            after = f", recovered {outcome['recovered']:.3f}" if "recovered" in outcome else ""
            print(*named, f"{outcome['metric']:.3f}{after}", flush=True)
    picture = args.out.with_suffix(".png")
    plot(found, seeds, picture)
    command = f"--seeds {' '.join(map(str, args.seeds))} --recover {' '.join(map(str, recover))}"
    command += f" --recovery {args.recovery} --models {' '.join(args.models)} --jobs {args.jobs}"
    args.out.write_text(page(found, seeds, study, command, args.jobs))
    print(f"wrote {args.out} and {picture}")


if __name__ == "__main__":
    run(main)
