"""Count parameters and multiply-adds of detectors, by part and by component of the decoder; print the papers' tables.

Nothing is downloaded and no weights are allocated: the configs are built and run on shapes only.
mmdet_lors/analysis/complexity.py says what counts as a multiply-add. For a config with LORS, the last columns are its
cost when served folded, as a plain decoder with the same groups and points.
"""

import argparse
from pathlib import Path

from rich.table import Table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="config files")
    parser.add_argument("--input", default="1280x800", metavar="WxH", help="input size (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all counts to this file")
    parser.add_argument(
        "--paper",
        nargs="?",
        const="lors",
        choices=["lors", "pela"],
        help="print a paper's tables beside our numbers, as Markdown: Tables 1-11 of LORS (default), or 1-9 of PELA",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

from mmdet.utils import register_all_modules

from mmdet_lors.analysis.arguments import width_and_height
from mmdet_lors.analysis.complexity import COMPONENTS, Report, measure
from mmdet_lors.analysis.output import console
from mmdet_lors.conversion.folding import folded_config
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json


def report_config(path: str, size: tuple[int, int]) -> tuple[Report, Report | None]:
    """The report of a config, and, if it has LORS, of the same model served folded.

    Raises:
        UserError: a config that is missing or broken, or does not build an AdaMixer.
    """
    cfg = load_config(path)
    report = measure(cfg.model, size)
    plain = folded_config(cfg.model)
    return report, measure(plain, size) if plain else None


def table(title: str, report: Report, served: Report | None) -> Table:
    """One row per part and component."""
    grid = Table(title=title, title_justify="left", caption_justify="left")
    columns = ["parameters", "products, G", "elements, G", "multiply-adds, G"]
    for name in ["", *columns, *(["folded: parameters", "multiply-adds, G"] if served else [])]:
        grid.add_column(name, justify="right" if name else "left")

    def add(name: str, pick, style: str | None = None) -> None:
        cost, plain = pick(report), pick(served) if served else None
        counted = [cost.products, cost.elements, cost.multiply_adds] if cost else []
        cells = [f"{cost.parameters:,}", *(f"{n / 1e9:.3f}" for n in counted)] if cost else [""] * 4
        if served:
            cells += [f"{plain.parameters:,}", f"{plain.multiply_adds / 1e9:.3f}"] if plain else ["", ""]
        grid.add_row(name, *cells, style=style)

    for part in report.parts:
        add(part, lambda r, part=part: r.parts[part])
    add("decoder", lambda r: r.decoder)
    for label in COMPONENTS:
        if any(label in r.components for r in (report, served) if r):
            add(f"  {label}", lambda r, label=label: r.components.get(label), "dim")
    add("total", lambda r: r.total, "bold")
    grid.caption = (
        f"{report.total.trainable:,} parameters are trainable; the reference counts {report.reference_parameters:,}, "
        f"4 more constants per query. Operations: {report.num_queries} queries, one image of {report.size[0]} x "
        f"{report.size[1]}."
    )
    return grid


def main() -> None:
    """Count, then print the tables or write JSON."""
    args = parse_args()
    size = width_and_height("--input", args.input, smallest=32)  # the largest stride
    if not args.configs and not args.paper:
        raise UserError("give at least one CONFIG, or --paper")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: folder {args.json.parent} does not exist")
    if missing := [path for path in args.configs if not Path(path).is_file()]:
        raise UserError(f"config {missing[0]} does not exist")

    register_all_modules()
    out, found = console(), {}
    for path in args.configs:
        report, served = report_config(path, size)
        out.print(table(path, report, served))
        found[path] = dict(report.as_dict(), folded=served and served.as_dict())
    if args.json:
        args.json.write_text(to_json(found, indent=2) + "\n")
    if args.paper:
        # Imported here: the tables need packages that nothing else needs.
        from paper_tables.render import Paper

        print(Paper(args.paper).markdown(), end="")


if __name__ == "__main__":
    run(main)
