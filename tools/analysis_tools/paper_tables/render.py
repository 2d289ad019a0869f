"""Renders a paper's tables as Markdown, our counts beside the paper's. The tables are data: lors.yml and pela.yml.

A file has ``models``, ``reasons`` and ``page``: texts and tables in their order.

- A model is {function of models.py: its first argument, other: arguments}; ``shown``: how the page names it.
- In a text {model[heading]} is a figure of ours, {n[reason]} the number of a reason.
- ``header`` names the columns. "X (ours)", or "(ours)" right of "X (paper)": our figure X, printed as ``formats``
  says. Any other column that is not in BUILT, VERDICT or MEASURED has the next of a row's ``cells``.
- A row has a ``model`` if this project builds it, and may have a ``note``. It has a ``reason``, a key of ``reasons`` or
  a text, if and only if a figure of the paper with a column of ours beside it differs from ours, or is not compared:
  there is none of ours, or the table's ``compared`` leaves it out. ``only``: which figures of the model are the row's.
  ``against``: with which figure of ours, times what, the paper's is compared.
"""

import importlib.util
import math
from pathlib import Path

import yaml

from mmdet_lors.analysis.study import table as grid
from mmdet_lors.errors import UserError

from . import models

BUILT = ("config", "built from")
VERDICT = ("differs", "difference, ours to the paper's")
MEASURED = "(measured by this project)"


def agrees(paper: str, ours: float) -> bool:
    """Whether ours is the paper's number, rounded or truncated: the paper does both (34.56 -> 34, 36.93 -> 37)."""
    scale = 10 ** len(paper.partition(".")[2])
    return round(float(paper) * scale) in (round(ours * scale), math.floor(ours * scale))


class Counts(dict):
    """Key of a model -> its figures, counted at first use."""

    def __init__(self, specs: dict) -> None:
        super().__init__()
        self.specs = dict(specs)

    def __missing__(self, key: str) -> dict[str, float]:
        (kind, name), *settings = self.specs[key].items()
        if kind == "sum":  # of models, each times its factor
            self[key] = {h: sum(f * self[k].get(h, 0) for k, f in name.items()) for h in self[next(iter(name))]}
        else:
            self[key] = getattr(models, kind)(name, **{k: v for k, v in settings if k != "shown"})
        return self[key]

    def shown(self, key: str) -> str:
        """How the page names a model."""
        spec = self.specs[key]
        config = str(next(iter(spec.values())))
        return spec.get("shown", "{link}").format(link=f"[{Path(config).name}](../configs/{config}.py)")


class Paper:
    """The tables of one paper.

    Args:
        name: its file's name without '.yml'.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        data = yaml.safe_load(Path(__file__).with_name(f"{name}.yml").read_text())
        self.reasons, self.page, self.tolerance = data["reasons"], data["page"], data.get("tolerance")
        self.packages = data.get("packages", {})
        self.numbers = {key: number for number, key in enumerate(self.reasons, start=1)}
        self.counts = Counts(data["models"])
        self.tables = [part for part in self.page if isinstance(part, dict) and "rows" in part]

    def missing_packages(self) -> list[str]:
        """Packages that the tables need and that are not installed."""
        return [package for module, package in self.packages.items() if importlib.util.find_spec(module) is None]

    def ours(self, row: dict) -> dict[str, float]:
        """Our figures for a row; none if it is not built."""
        if "model" not in row:
            return {}
        key = row["model"]
        if isinstance(key, dict):
            key = str(key)
            self.counts.specs[key] = row["model"]
        found = self.counts[key]
        return {heading: found[heading] for heading in row.get("only", found)}

    def printed(self, table: dict, row: dict) -> dict[str, str]:
        """Heading -> the paper's figure, as printed."""
        given = [h for h in table["header"] if h not in (*BUILT, *VERDICT) and not h.endswith(("(ours)", MEASURED))]
        return dict(zip(given, map(str, row["cells"]), strict=True))

    def pairs(self, table: dict) -> list[str]:
        """The figures for which a table has both the paper's value and ours."""
        names = [heading.removesuffix(" (paper)") for heading in table["header"]]
        beside = zip(names, table["header"][1:], strict=False)
        return [name for name, right in beside if right in ("(ours)", f"{name} (ours)")]

    def differences(self, table: dict, row: dict) -> dict[str, tuple[str, float]]:
        """Name of what is compared -> the paper's figure, and ours."""
        printed, ours = self.printed(table, row), self.ours(row)
        compared = table.get("compared") or {name.removesuffix(", M"): name for name in self.pairs(table)}
        against = table.get("against", {}) | row.get("against", {})
        found = {}
        for label, name in compared.items():
            figure, factor = against.get(name, (name, 1))
            if figure in ours:
                found[label] = (printed[f"{name} (paper)"], factor * ours[figure])
        return found

    def verdict(self, table: dict, row: dict) -> str:
        """The text of the last column.

        Raises:
            ValueError: a row differs without a reason, or has a reason without differing.
        """
        found, reason = self.differences(table, row), row.get("reason")
        if self.tolerance:
            percents = {name: 100 * (ours / float(paper) - 1) for name, (paper, ours) in found.items()}
            differing = [name for name, percent in percents.items() if abs(percent) > 100 * self.tolerance]
            signed = {name: f"{p:+.1f} %" if abs(p) >= 0.05 else "0.0 %" for name, p in percents.items()}
            text = ", ".join(" ".join(pair) for pair in signed.items()) or "not built"
        else:
            differing = [name for name, (paper, ours) in found.items() if not agrees(paper, ours)]
            text = ", ".join(differing) or row.get("note", "")
        if bool(differing or len(found) < len(self.pairs(table))) != bool(reason):
            place = f"{table['title'].lstrip('# ')}, {row['cells']}"
            raise ValueError(f"{place}: differs in {differing} of {found}, reason {reason}")
        if reason and reason not in self.numbers:
            return reason.format_map(self.ours(row))
        return f"**{text}** [{self.numbers[reason]}]" if reason else text

    def row(self, table: dict, row: dict) -> list[str]:
        """A row's cells."""
        printed, ours, cells = self.printed(table, row), self.ours(row), []
        for heading, left in zip(table["header"], ["", *table["header"]], strict=False):
            if heading in printed:
                cells.append(printed[heading])
            elif heading.endswith("(ours)"):
                name = (left if heading == "(ours)" else heading).rpartition(" (")[0]
                cells.append(format(ours[name], table["formats"][name]) if name in ours else "-")
            elif heading in BUILT:
                cells.append(self.counts.shown(str(row["model"])) if ours else "-")
            else:
                cells.append(self.verdict(table, row) if heading in VERDICT else "")
        return cells

    def lines(self, part: dict) -> list[list[str]]:
        """A table of our figures only, one per line, for several models; a figure that a model lacks is left empty."""
        rows = []
        for label, figure in part["lines"].items():
            bold = "**" if label.startswith("**") else ""
            found = [self.counts[key].get(figure or label) for key in part["models"].values()]
            rows.append([label, *("" if value is None else f"{bold}{value:.2f}{bold}" for value in found)])
        return rows

    def markdown(self) -> str:
        """The page.

        Raises:
            UserError: a package that the tables need is not installed.
            ValueError: see :meth:`verdict`.
        """
        if missing := self.missing_packages():
            raise UserError(
                f"--paper {self.name} needs {missing[0]}, which is not installed; requirements.txt has its version"
            )
        self.counts["n"] = self.numbers
        blocks = []
        for part in self.page:
            if isinstance(part, str):
                blocks.append(part.format_map(self.counts).strip())
                continue
            blocks.append(part["title"])
            if "rows" in part:
                blocks.append("\n".join(grid(part["header"], [self.row(part, row) for row in part["rows"]])))
            elif "lines" in part:
                blocks.append("\n".join(grid([part["first"], *part["models"]], self.lines(part))))
            else:
                texts = {key: text.format_map(self.counts).strip() for key, text in self.reasons.items()}
                blocks += [f"[{self.numbers[key]}] {text}" for key, text in texts.items()]
        return "\n\n".join(blocks) + "\n"
