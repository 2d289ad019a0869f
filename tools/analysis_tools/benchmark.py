"""Time and memory of AdaMixer's decoder: plain, with LORS by each path, folded, and against a naive yardstick.

Every variant has a process of its own. The variants of a comparison take turns, round after round: a slow moment of the
machine hits them all. A ratio is the median over rounds of the ratio within the round; there is none where other
processes took more than 5 % of a core meanwhile. The matrix rate is that of a 4096 x 4096 product, which takes turns
with the variants; a variant's share of it counts what a plain decoder of the same groups and points must multiply.
"""

import argparse
import itertools
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median

from decoder_benchmark.variants import BASE, VARIANTS, WORKS


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sections", nargs="+", choices=["speed", "memory", "growth", "profile"], default=["speed", "memory"],
        help="profile: where a CPU's time goes, and the rates of matrix products (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
                        help=f"of: {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS), help="(default: all)")
    parser.add_argument("--level", nargs="+", choices=["decoder", "detector"], default=["decoder"],
                        help="the detector has a ResNet-50 and takes images (default: %(default)s)")  # fmt: skip
    parser.add_argument("--queries", nargs="+", type=int, default=[100, 300], help="(default: %(default)s)")
    parser.add_argument("--batch", nargs="+", type=int, default=[2], help="(default: %(default)s)")
    parser.add_argument("--size", default="320x320", help="WIDTHxHEIGHT (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU (default: %(default)s)")
    parser.add_argument("--keep-memory", action="store_true",
                        help="freed memory stays in the process, as tools/train.py has it on a CPU")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single time to this file")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="write the tables, and the plot of growth beside it"
    )
    parser.add_argument("--append", action="store_true", help="add to the file of --out instead of replacing it")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import matplotlib

matplotlib.use("Agg")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler reports a missing GPU as an error
import matplotlib.pyplot as plt
import torch
from decoder_benchmark.apart import Apart
from decoder_benchmark.case import OBJECTS, PASSES, Case, MatrixProduct, products
from decoder_benchmark.operations import operations
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger
from torch import nn

from mmdet_lors.analysis.arguments import width_and_height
from mmdet_lors.analysis.study import table
from mmdet_lors.analysis.timing import hardware, interleaved, ratio, seconds
from mmdet_lors.engine.cpu import keep_memory
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json

MOST_OTHER_WORK = 0.05
"""Of a core, beside which ratios are given."""
PRODUCT = "matrix product"
MOST_OPERATIONS = 14
"""In a table of the profile, the longest first."""


def apart(args: argparse.Namespace, **fixed: object) -> Apart:
    """A case in a process of its own."""
    return Apart(Case, args.threads, args.keep_memory, args.device, size=args.size, **fixed)


def speed(args: argparse.Namespace, names: Sequence[str], **fixed: object) -> tuple[dict[str, list[float]], float]:
    """Compare variants, and the matrix product where its rate says something about the work.

    Returns:
        The seconds of each, one number per round, and the part of a core that other processes took.
    """
    with ExitStack() as stack:
        cases = {name: stack.enter_context(apart(args, name=name, **fixed)) for name in names}
        if fixed["work"] in PASSES and fixed["level"] == "decoder":
            product = Apart(MatrixProduct, args.threads, args.keep_memory, args.device)
            cases[PRODUCT] = stack.enter_context(product)
        found = interleaved(cases, args.repeats)
        seen = [seen for case in cases.values() for seen in case.seen]
        return found, sum(turn.others for turn in seen) / sum(turn.wall for turn in seen)


def alone(args: argparse.Namespace, **fixed: object) -> dict[str, float]:
    """Seconds (median of 2, after one that does not count) and peak memory in GB of one case."""
    with apart(args, **fixed) as case:
        return dict(seconds=median([case() for _ in range(3)][1:]), peak=case.peak())


GROWTH = {"queries": [50, 200, 600, 1200], "stages": [1, 3, 6, 12], "batch": [1, 4, 16]}


def growth(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Time and memory of forward + backward of LORS over one size at a time; the others are 100, 6 and 1."""
    found = {}
    for what, values in GROWTH.items():
        found[what] = []
        for value in values:
            sizes = dict(queries=100, stages=6, batch=1) | {what: value}
            point = alone(args, name="LORS", work="backward", level="decoder", **sizes)
            found[what].append(dict(point, value=value))
            print(f"growth, {what} {value}: {point['seconds']:.3f} s, {point['peak']:.2f} GB", flush=True)
    return found


def exponent(points: list[dict], key: str) -> float:
    """Slope of log(key) over log(value) between the two largest sizes."""
    (x0, y0), (x1, y1) = ((math.log(p["value"]), math.log(p[key])) for p in points[-2:])
    return (y1 - y0) / (x1 - x0)


def attention_share(args: argparse.Namespace, queries: int) -> float:
    """Share of self-attention, the only part that grows with the square of the queries, in a forward pass."""
    case, spent = Case("LORS", "inference", queries, 1, args.size, "decoder", args.device), []

    def watch(attention: nn.Module) -> None:
        forward = attention.forward

        def timed(*inputs: torch.Tensor) -> torch.Tensor:
            outputs: list[torch.Tensor] = []
            spent.append(seconds(lambda: outputs.append(forward(*inputs)), args.device))
            return outputs[0]

        attention.forward = timed

    for stage in case.model.decoder.stages:
        watch(stage.attention)
    case()
    spent.clear()
    return sum(spent) / total if (total := case()) else 0.0


def speed_section(args: argparse.Namespace, results: dict) -> list[str]:
    """Interleaved times of all asked-for works, queries and batches."""
    lines = []
    for level in args.level:
        for work in args.work:
            names = [name for name in args.variants if work == "inference" or not VARIANTS[name].served]
            bases = [base for base in (BASE, "naive plain 2x64", "naive LORS") if base in names]
            header, rows, busy = [f"{level}: {WORKS[work]}"], [[name] for name in names], []
            for queries, batch in [(n, b) for b in args.batch for n in args.queries]:
                found, others = speed(args, names, work=work, queries=queries, batch=batch, level=level)
                results[f"{level}/{work}/{queries}/{batch}"] = dict(found, others=others)
                quiet = not others > MOST_OTHER_WORK  # also where it is not known
                if not quiet:
                    busy.append(f"{others:.2f} at {queries} queries, batch {batch}")
                header += [f"{queries} queries, batch {batch}: s", *(f"/ {base}" for base in bases)]
                rates = found.get(PRODUCT)
                header += ["of the matrix rate"] if rates else []
                for row in rows:
                    name = row[0]
                    row += [f"{median(found[name]):#.3g}"]
                    row += [f"{ratio(found, name, base):.2f}" if quiet else "" for base in bases]
                    if rates:
                        share = PASSES[work] * batch * products(name, queries, args.size) / MatrixProduct.side**3
                        share *= ratio(found, PRODUCT, name)
                        row += [f"{share:.2f}" if quiet else ""]
            told = table(header, rows)
            if busy:
                told += [
                    "",
                    f"No ratios where other processes took more than {MOST_OTHER_WORK} of a core: {'; '.join(busy)}.",
                ]
            print("\n".join([*told, ""]), flush=True)
            lines += [*told, ""]
    return lines


def memory_section(args: argparse.Namespace, results: dict) -> list[str]:
    """Peak memory of a forward + backward, every variant in its own process."""
    rows = []
    names = [name for name in args.variants if not VARIANTS[name].served]
    for queries in args.queries:
        peaks = {}
        for name in names:
            fixed = dict(name=name, work="backward", queries=queries, batch=2, level="decoder")
            peaks[name] = alone(args, **fixed)["peak"]
        for name in names:
            bases = [f"{peaks[name] / peaks[base]:.2f}" if base in peaks else "" for base in (BASE, "naive LORS")]
            rows.append([name, str(queries), f"{peaks[name]:.2f}", *bases])
        results[f"memory/{queries}"] = peaks
    kind = "peak allocated" if args.device == "cuda" else "peak resident"
    lines = table(["forward + backward, batch 2", "queries", f"{kind}, GB", f"/ {BASE}", "/ naive LORS"], rows)
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def growth_section(args: argparse.Namespace, results: dict, picture: Path | None) -> list[str]:
    """Growth with one size at a time."""
    found = growth(args)
    most = GROWTH["queries"][-1]
    share = attention_share(args, most)
    results["growth"], results["attention share"] = found, share
    rows = []
    for what, points in found.items():
        values = ", ".join(str(p["value"]) for p in points)
        for key, unit in (("seconds", "time, s"), ("peak", "peak memory, GB")):
            figures = ", ".join(f"{p[key]:.2f}" for p in points)
            rows.append([what, values, unit, figures, f"{exponent(points, key):.2f}"])
    lines = [
        "LORS, decoder, forward + backward with matching, each point in its own process; 100 queries, 6 stages and "
        "batch 1 where not varied. The exponent is the slope of log over log between the two largest sizes.",
        "",
        *table(["over", "sizes", "", "measured", "exponent"], rows),
        "",
        f"Self-attention, whose cost grows with the square of the queries, takes {100 * share:.1f} % of a forward pass "
        f"at {most} queries.",
        "",
    ]
    if picture:
        figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
        for axis, (what, points) in zip(axes, found.items(), strict=True):
            x = [p["value"] for p in points]
            axis.plot(x, [p["seconds"] for p in points], "o-", color="tab:blue", label="time, s")
            axis.plot(x, [p["peak"] for p in points], "s--", color="tab:orange", label="peak memory, GB")
            axis.set(xlabel=what, ylim=(0, None), xlim=(0, None))
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle("LORS decoder, forward + backward with matching")
        figure.savefig(picture, dpi=110)
        lines += [f"![Growth]({picture.name})", ""]
    return lines


def profile_section(args: argparse.Namespace, results: dict) -> list[str]:
    """Where the time of each variant goes, one after the other in this process.

    Raises:
        UserError: there is a GPU to profile.
    """
    if args.device == "cuda":
        raise UserError("--sections profile is for --device cpu: tools/gpu_check.py --sections profile is for a GPU")
    if args.keep_memory:
        keep_memory()
    lines, matrices = [], MatrixProduct(args.device)
    works = [work for work in args.work if work in PASSES]
    for work, queries, batch, name in itertools.product(works, args.queries, args.batch, args.variants):
        if VARIANTS[name].served and work != "inference":
            continue
        case = Case(name, work, queries, batch, args.size, "decoder", args.device)
        before = [matrices() for _ in range(2)]
        found = operations(case, args.repeats)
        rate = MatrixProduct.side**3 / median([*before, matrices()])
        results[f"profile/{work}/{queries}/{batch}/{name}"] = dict(rate=rate, operations=[vars(kind) for kind in found])
        whole = sum(kind.seconds for kind in found)
        multiplying = [kind for kind in found if kind.multiply_adds]
        spent, done = sum(kind.seconds for kind in multiplying), sum(kind.multiply_adds for kind in multiplying)
        rows = [
            [
                f"`{kind.name}` {kind.shapes}".strip(),
                str(kind.calls),
                f"{100 * kind.seconds / whole:.1f} %",
                f"{kind.multiply_adds / kind.seconds / rate:.2f}" if kind.multiply_adds else "",
            ]
            for kind in found[:MOST_OPERATIONS]
        ]
        lines += table(
            [f"{name}: {WORKS[work]}, {queries} queries, batch {batch}", "calls", "of the time", "of the matrix rate"],
            rows,
        )
        lines += [
            "",
            f"{100 * spent / whole:.0f} % of the time goes into matrix products, which run at "
            f"{done / spent / rate:.2f} of the matrix rate: {done / whole / rate:.2f} of it over all operations.",
            "",
        ]
    print("\n".join(lines), flush=True)
    return lines


SECTIONS = {"speed": speed_section, "memory": memory_section, "profile": profile_section}


def check(args: argparse.Namespace) -> None:
    """Refuse what argparse cannot know.

    Raises:
        UserError: names the option.
    """
    args.size = width_and_height("--size", args.size, multiple=32)
    if min(args.repeats, args.threads, *args.queries, *args.batch) < 1:
        raise UserError("--repeats, --threads, --queries and --batch must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Measure, print, and write what was asked for."""
    args = parse_args()
    check(args)
    torch.set_num_threads(args.threads)
    register_all_modules()
    MMLogger.get_current_instance().setLevel("WARNING")
    results: dict = {}
    width, height = args.size
    lines = [
        f"Made by `python {shlex.join(['tools/analysis_tools/benchmark.py', *sys.argv[1:]])}` on {date.today()}: "
        f"{hardware(args.device)}, torch {torch.__version__}, Python {platform.python_version()}, float32, "
        f"{width} x {height} pixels, {OBJECTS} objects an image, {args.repeats} rounds. Ratios carry over to other "
        "machines, seconds do not. `naive` is tools/analysis_tools/decoder_benchmark/naive.py.",
        "",
    ]
    for section in args.sections:
        lines += [f"## {section.capitalize()}", ""]
        if section == "growth":
            lines += growth_section(args, results, args.out and args.out.with_suffix(".png"))
        else:
            lines += SECTIONS[section](args, results)
    if args.json:
        args.json.write_text(to_json(results, indent=1) + "\n")
    if args.out:
        before = args.out.read_text() + "\n" if args.append and args.out.is_file() else "# Benchmark of the decoder\n\n"
        args.out.write_text(before + "\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    run(main)
