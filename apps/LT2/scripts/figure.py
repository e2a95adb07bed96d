"""Shared by plotting scripts: matplotlib without a display, colours, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingua.errors import UserError, import_optional

COLOURS = ["#2563eb", "#d97706", "#059669", "#be185d", "#6d28d9", "#475569"]


def import_pyplot(needed_by: str) -> Any:
    matplotlib = import_optional("matplotlib", extra="plot", needed_by=needed_by)
    matplotlib.use("Agg")  # needs no display
    return import_optional("matplotlib.pyplot", extra="plot", needed_by=needed_by)


def save_figure(figure: Any, out: Path) -> None:
    """Write the figure. UserError if the path cannot be written."""
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {error}") from None
