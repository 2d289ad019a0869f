"""The options that all studies have."""

import argparse
from pathlib import Path

ROOT = Path(__file__).parents[2]


def add_study_options(parser: argparse.ArgumentParser, name: str, folder: str = "") -> None:
    """The options that all studies have: how many runs at a time, where they are, and the page in docs/."""
    work, page = Path("work_dirs") / name, ROOT / "docs" / folder / f"{name}.md"
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=work, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=page, help="(default: %(default)s)")
