"""Page and plot of the decoder study."""

from datetime import date
from math import cos, pi, sin
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from mmdet_lors.analysis.study import machine, table

from .results import MARGIN, Difference, Found, Results, residual, succeeded
from .rows import CLAIMS, LORS, PLAIN, ROWS, Bench, Row


def plot(found: Found, path: Path) -> None:
    """Mean AP over decoder parameters, with the standard deviation over seeds."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    points = []
    for row in ROWS:
        runs = list(succeeded(found, row.name).values())
        if not runs or row.length != 1 or row.optimizer or row.warm_up != Row.warm_up or row.warm_start:
            continue
        aps, place = [run["ap"] for run in runs], runs[0]["parameters"] / 1e6
        colour = "tab:orange" if "lors" in row.decoder else "tab:blue"
        spread = stdev(aps) if len(aps) > 1 else 0.0
        axes.errorbar(place, mean(aps), spread, fmt="o", color=colour, capsize=3)
        points.append((place, mean(aps), spread, row.name))
    axes.set(xlabel="decoder parameters, millions", ylabel="AP, validation split")
    axes.grid(alpha=0.3)
    axes.margins(x=0.2, y=0.1)
    _label(axes, points)
    figure.savefig(path, dpi=110)


def _label(axes: Axes, points: list[tuple[float, float, float, str]]) -> None:
    """Names of points (x, y, error, name), each at the nearest place that covers no error bar and no other name."""
    axes.figure.draw_without_rendering()
    pixels = [axes.transData.transform(point[:2]) for point in points]
    scale = axes.transData.transform((0, 1))[1] - axes.transData.transform((0, 0))[1]
    taken = [(*pixel, 6.0, 6.0 + scale * point[2]) for pixel, point in zip(pixels, points, strict=True)]  # half sizes
    distances = [(r, turn * pi / 8) for r in range(8, 240, 8) for turn in range(16)]
    for (x, y, _, name), pixel in zip(points, pixels, strict=True):
        wide, high = 3.4 * len(name), 7.0
        for r, angle in distances:
            at = pixel[0] + (r + wide) * cos(angle), pixel[1] + (r + high) * sin(angle)
            if not any(abs(at[0] - u) < wide + w and abs(at[1] - v) < high + h for u, v, w, h in taken):
                break
        taken.append((*at, wide, high))
        style = dict(fontsize=8, ha="center", va="center", arrowprops=dict(arrowstyle="-", color="0.7", shrinkB=3))
        axes.annotate(name, (x, y), xytext=axes.transData.inverted().transform(at), **style)


def convergence(found: Found) -> list[str]:
    """What twice the iterations change, beside what the seed does."""
    gains, spread, last = [], 0.0, []
    for name in (PLAIN, LORS):
        once, twice = succeeded(found, name), succeeded(found, f"{name}, twice as long")
        pairs = sorted(once.keys() & twice.keys())
        if not pairs or len(once) < 2:
            return []
        gains.append(mean(twice[key]["ap"] - once[key]["ap"] for key in pairs))
        spread = max(spread, stdev(run["ap"] for run in once.values()))
        last.append(mean(twice[key]["ap"] for key in pairs))
    said = "have converged" if max(map(abs, gains)) <= spread else "**have not converged**: AP depends on their length"
    return [
        f"**Length.** Twice the iterations change AP by {gains[0]:+.3f} (plain) and {gains[1]:+.3f} (LORS), seeds by "
        f"{spread:.3f} (standard deviation), so that runs of this length {said}. LORS minus plain is "
        f"{last[1] - last[0]:+.3f} after twice the iterations ({len(pairs)} seed{'s' * (len(pairs) > 1)}).",
        "",
    ]


def page(results: Results, command: str, picture: str) -> str:
    """The study as Markdown."""
    found, bench, features = results.found(), Bench(**results.content["bench"]), results.content["features"].values()
    todo = results.missing()
    runs = [outcome for of_row in found.values() for outcome in of_row.values()]
    good = [outcome for outcome in runs if "failed" not in outcome]
    hours = sum(outcome["seconds"] for outcome in (*runs, *features)) / 3600
    of_features = ", ".join(f"{made['ap']:.3f}" for made in features)
    main = Difference.of(found, LORS, PLAIN)
    lines = [
        "# Does LORS reach the plain decoder?",
        "",
        *([f"On this bench LORS's AP minus plain's is **{main}**, mean and 95 % interval: that LORS reaches plain with "
           f"a third of its parameters **{main.verdict(reaches=True)}**.", ""] if main else []),
        *([f"**Not finished**: {len(todo)} runs are still to be done.", ""] if todo else []),
        f"Made by `{command}`, page of {date.today()}; {machine()}. {len(good)} runs of {bench.iterations} iterations "
        f"(batch {bench.batch_size}, learning rate {bench.learning_rate}), one thread each, {hours:.1f} hours of "
        f"processes with the features.",
        "",
        "**The bench.** As the paper starts from a pre-trained backbone and only the decoder is new, backbone and neck "
        f"were trained once on {bench.train_images} pictures of {bench.size} pixels of the embedded digits (AP "
        f"{of_features} with their own plain decoder of three stages) and frozen. Every row's decoder of six stages, "
        f"{bench.queries} queries and a content of 64 was trained from scratch on these features and judged on "
        f"{bench.val_images} other pictures. AP's standard error from which pictures those are is "
        f"{mean(outcome['error'] for outcome in good):.3f} (bootstrap, {len(good)} runs); the same pictures judge all "
        "rows, so that differences between rows vary less.",
        "",
    ]  # fmt: skip
    lines += convergence(found)
    cells = []
    for row in ROWS:
        of_row = succeeded(found, row.name)
        if not of_row:
            continue
        aps = [outcome["ap"] for outcome in of_row.values()]
        spread = f" ± {stdev(aps):.3f}" if len(aps) > 1 else ""
        differences = [Difference.of(found, row.name, base) if row.name != base else None for base in (PLAIN, LORS)]
        parameters = next(iter(of_row.values()))["parameters"]
        ap50, seconds = ([run[name] for run in of_row.values()] for name in ("ap50", "seconds"))
        cells.append([row.name, row.what, f"{parameters / 1e6:.2f}", f"{mean(aps):.3f}{spread}", str(len(aps)),
                      *(str(difference or "") for difference in differences), f"{mean(ap50):.3f}",
                      f"{min(seconds):.0f}"])  # fmt: skip
    header = ["row", "", "decoder parameters, M", "AP ± s.d.", "seeds", "AP - plain [95 %]", "AP - LORS [95 %]", "AP50",
              "seconds"]  # fmt: skip
    lines += table(header, cells)
    lines += [
        "",
        f"![AP over decoder parameters]({picture})",
        "",
        "## The paper's claims, and the control that it lacks",
        "",
    ]
    told, (deviation, freedom) = [], residual(found)
    for claim in CLAIMS:
        difference = Difference.of(found, claim.row, claim.base)
        verdict = difference.verdict(claim.reaches) if difference else "fewer than two pairs"
        told.append([claim.table, claim.text, f"{claim.row} - {claim.base}", str(difference or ""), verdict])
    lines += table(["table", "claim", "rows", "difference of AP [95 %]", "verdict"], told)
    lines += [
        "",
        "Differences are paired by seed and features; intervals are Student's, 95 % each, with one standard deviation "
        f"for all rows, {deviation:.4f} ({freedom} degrees of freedom, rows and seeds as a two-way analysis of "
        f"variance). A claim that a row reaches another's AP holds if the interval lies above {-MARGIN}, one that "
        "it is better if it lies above zero. Seconds are the shortest training's, by the clock: other work disturbed "
        "many.",
        "",
    ]
    failed = [
        f"- {name}, seed {outcome['seed']}: {outcome['failed']}"
        for name, of_row in found.items()
        for outcome in of_row.values()
        if "failed" in outcome
    ]
    lines += ["## Runs that failed", "", *(failed or ["None."]), ""]
    if todo:
        left = ", ".join(f"{row.name} (seed {seed})" for row, seed in todo)
        lines += ["## Runs that are not done", "", f"{left}.", ""]
    lines += [
        "## What this is not",
        "",
        "Decoders here are 50 times smaller than the paper's, the features come from a detector with a plain decoder "
        "and see ten classes of digits, and training takes minutes. It says nothing about COCO: there, LORS was not "
        "trained by this project.",
        "",
    ]
    return "\n".join(lines)
