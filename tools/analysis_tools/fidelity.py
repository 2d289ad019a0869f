"""Print every setting of the papers and of their authors' releases beside that of our configs, as Markdown.

The settings are data: paper_tables/fidelity.yml. Ours are read from the configs as they are loaded.
"""

import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    return argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import math
from functools import cache
from typing import Any

import yaml
from mmengine.config import Config

from mmdet_lors.analysis.study import ROOT, link, table
from mmdet_lors.engine.launch import run

HEADER = ("setting", "authors'", "source", "ours", "")
Row = dict[str, Any]


def sections() -> list[dict]:
    """The page's sections: a ``title``, the ``config`` that it is about, if there is one, ``text`` and ``rows``.

    A row has ``what``, ``theirs``, '?' where we do not know it, and its ``source``, 'paper' or 'release'. Where ours is
    is ``at``, a dotted place in the config, or several with ' * ' between them for their product; else ``ours`` is a
    text. A row has to have ``why`` if ours differs.
    """
    return yaml.safe_load((Path(__file__).parent / "paper_tables/fidelity.yml").read_text())


@cache
def config(name: str) -> dict:
    """A config below configs/. Shared: not to be changed."""
    return Config.fromfile(ROOT / f"configs/{name}.py").to_dict()


def value(cfg: dict, place: str) -> Any:
    """What a config has at a place; None if it has no such field."""
    found: Any = cfg
    for key in place.split("."):
        if found is None:
            return None
        found = found[int(key)] if key.isdigit() else found.get(key)
    return found


def ours(section: dict, row: Row) -> Any:
    """Our value of a row."""
    if "ours" in row:
        return row["ours"]
    found = [value(config(row.get("config", section["config"])), place) for place in row["at"].split(" * ")]
    return math.prod(found) if len(found) > 1 else found[0]


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same, but for the rounding of a product."""
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-9) if numbers else a == b


def shown(found: Any) -> str:
    """A value in a cell."""
    if found is None:
        return "none"
    if isinstance(found, list):
        return ", ".join(map(shown, found))
    return f"{found:.6g}" if isinstance(found, float) else str(found)


def line(section: dict, row: Row) -> list[str]:
    """The cells of a row.

    Raises:
        ValueError: it differs without a reason.
    """
    mine, why = ours(section, row), row.get("why", "")
    if not equal(row["theirs"], mine) and not why:
        raise ValueError(f"{section['title']}, {row['what']}: {mine!r} instead of {row['theirs']!r}, without a reason")
    verdict = "equal" if equal(row["theirs"], mine) else "not known" if row["theirs"] == "?" else "**differs**"
    return [row["what"], shown(row["theirs"]), row["source"], shown(mine), f"{verdict}: {why}" if why else verdict]


def main() -> None:
    """Print the page."""
    parse_args()
    for section in sections():
        print(f"{section['title']}\n")
        if "config" in section:
            print(f"Of {link('configs/' + section['config'] + '.py')}.\n")
        if "text" in section:
            print(section["text"].strip() + "\n")
        if "rows" in section:
            print("\n".join(table(HEADER, [line(section, row) for row in section["rows"]])) + "\n")


if __name__ == "__main__":
    run(main)
