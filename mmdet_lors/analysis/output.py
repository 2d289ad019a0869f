"""Output of the analysis tools: pictures, and tables on the terminal."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from mmdet_lors.errors import UserError

WIDTH = 130
"""Columns of a table that is written to a file or a pipe."""


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write a picture; no display is needed.

    Raises:
        UserError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=dpi, pil_kwargs=dict(quality=90) if path.suffix == ".jpg" else None)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def console() -> Console:
    """The terminal, or a console of :data:`WIDTH` columns if the output goes elsewhere."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)
