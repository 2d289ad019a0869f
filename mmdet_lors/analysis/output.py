"""Output of the analysis tools: pictures, and tables on the terminal."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from mmdet_lors.errors import UserError

WIDTH = 130
"""Columns of a table that is written to a file or a pipe."""


def heat_map(ax: Axes, values: Tensor) -> None:
    """Draw similarities, (rows, columns) up to 1, as colours and numbers; NaN stays empty."""
    shown = ax.imshow(values.numpy(), cmap="magma", vmin=min(0.0, values.nan_to_num(0).min().item()), vmax=1)
    count = max(values.shape)
    size = 9 if count <= 4 else 7 if count <= 8 else 5
    for (i, j), value in np.ndenumerate(values.numpy()):
        if not np.isnan(value):
            colour = "black" if value > 0.6 else "white"
            ax.text(j, i, two_digits(value), ha="center", va="center", fontsize=size, color=colour)
    ax.set_yticks(range(values.shape[0]))
    ax.set_xticks(range(values.shape[1]))
    ax.figure.colorbar(shown, ax=ax, shrink=0.9)


def two_digits(value: float) -> str:
    """The number with two digits after the point, and no minus before a zero."""
    return f"{round(float(value), 2) + 0:.2f}"


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
