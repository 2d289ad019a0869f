"""Output of the analysis tools: pictures, and tables on the terminal."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from mmdet_lors.errors import UserError

FORMATS = (".png", ".pdf", ".svg", ".jpg")
WIDTH = 130
"""Columns of a table that is written to a file or a pipe."""


def check_writable(option: str, path: Path, formats: tuple[str, ...] = FORMATS) -> None:
    """Refuse, before the work is done, a file that could not be written.

    Raises:
        UserError: another ending than one of ``formats``, a folder, or a file in a folder that does not exist.
    """
    if path.suffix not in formats:
        raise UserError(f"{option} {path}: must end with {' or '.join(formats)}")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{option} {path}: must be a file in a folder that exists")


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
