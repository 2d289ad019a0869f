"""Does LORS reach the plain decoder? Train both, and what the paper varies, on frozen features of the digits.

Backbone and neck are trained once, with the plain detector, and frozen; their feature levels are kept on disk. On them
every row's decoder of six stages is trained from scratch, with several seeds, one thread a run. A run that has
finished stands in the page's JSON file and is not repeated: call the study again to go on. --page makes page and plot
of the runs that there are.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from decoder_bench.rows import ROWS, Bench
from options import ROOT


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Bench()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help="(default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="ROW", help="only these")
    parser.add_argument("--seeds", type=int, metavar="N", help="at most N seeds of each (default: 5 or 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no run after M minutes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    work, out = Path("work_dirs/decoder_study"), ROOT / "docs/measured/decoder_study.md"
    parser.add_argument("--work-dir", type=Path, default=work, help="features (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=out, help="page; runs and plot beside it (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from decoder_bench.page import page, plot
from decoder_bench.results import Results, succeeded
from decoder_bench.runs import one_run, prepare

from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError


def go_on(results: Results, bench: Bench, args: argparse.Namespace) -> None:
    """Run what is missing, and say after each run what it found and how long the rest will take."""
    folder = args.work_dir.absolute()
    print(f"features of {bench.train_images} images, {bench.feature_epochs} epochs, in {folder}", flush=True)
    features = prepare(bench, folder, args.device)
    print(f"features: AP {features['ap']:.3f} with the decoder that they were trained with", flush=True)
    results.use(features)
    todo = results.missing(args.rows, args.seeds)
    total, done, begin = sum(row.length for row, _ in todo), 0.0, time.monotonic()
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        runs = {}
        waiting = iter(todo)

        def start() -> None:
            late = args.minutes and time.monotonic() - begin > 60 * args.minutes
            if not late and (job := next(waiting, None)):
                runs[pool.submit(one_run, bench, *job, folder, args.device)] = job

        for _ in range(args.jobs):
            start()
        while runs:
            future = next(as_completed(runs))
            row, seed = runs.pop(future)
            outcome = future.result()
            results.add(row, seed, outcome)
            done += row.length
            start()
            said = outcome.get("failed") or f"AP {outcome['ap']:.3f}"
            hours = (time.monotonic() - begin) / done * (total - done) / 3600
            print(f"{row.name}, seed {seed}: {said}, {outcome['seconds']:.0f} s; {hours:.1f} h to go", flush=True)


def check(args: argparse.Namespace) -> None:
    """Refuse what argparse cannot know.

    Raises:
        UserError: names the option.
    """
    if args.jobs < 1 or min(getattr(args, name) for name in asdict(Bench())) <= 0:
        raise UserError("--jobs and the sizes must be 1 or more")


def main() -> None:
    """Run what is missing, then write the page and the plot."""
    args = parse_args()
    check(args)
    bench = Bench(**{name: getattr(args, name) for name in asdict(Bench())})
    results = Results(args.out.with_suffix(".json"), bench)
    if not args.page:
        go_on(results, bench, args)
    found = results.found()
    if not any(succeeded(found, row.name) for row in ROWS):
        raise UserError(f"{results.path} has no finished run")
    picture = args.out.with_suffix(".png")
    plot(found, picture)
    different = [f"--{name.replace('_', '-')} {value}" for name, value in asdict(bench).items()
                 if value != getattr(Bench, name)]  # fmt: skip
    command = " ".join(["python tools/studies/decoder_study.py", *different])
    args.out.write_text(page(results, command, picture.name))
    print(f"wrote {args.out} and {picture}")


if __name__ == "__main__":
    run(main)
