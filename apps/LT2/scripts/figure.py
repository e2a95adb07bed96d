"""Shared by plotting scripts: matplotlib without a display, colours, named lines, saving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingua.errors import UserError, import_optional

COLOURS = ["#2563eb", "#d97706", "#059669", "#be185d", "#6d28d9", "#475569"]
MORE_COLOURS = [*COLOURS, "#0891b2", "#dc2626", "#65a30d", "#f472b6", "#78350f", "#a78bfa"]
GREY = "#c3c8d0"  # unlabelled lines
PALE = {"alpha": 0.45, "linewidth": 0.7, "markersize": 5, "markeredgewidth": 0, "zorder": 1.5}
FORMATS = (".png", ".svg", ".pdf")
MAX_LABELS = len(MORE_COLOURS)
LABEL_SIZE = 8  # points
LONGEST_BESIDE = 26  # characters of a label; a legend with longer ones goes below the axes
MAX_HALF_WINDOW = 25  # logged values on either side that a smoothed line averages by default


@dataclass
class Line:
    x: list[float]
    y: list[float]
    label: str | None = None
    colour: Any = GREY
    style: str = "-"
    marker: str = ""
    width: float = 1.8
    raw: list[float] | None = None  # values before smoothing, drawn pale
    runs: list[tuple[list[float], list[float]]] = field(default_factory=list)  # of a mean: pale
    shift: float = 0.0  # to the right, in points, of runs with one point, and of y without a style


def import_pyplot(needed_by: str) -> Any:
    matplotlib = import_optional("matplotlib", extra="plot", needed_by=needed_by)
    matplotlib.use("Agg")  # needs no display
    matplotlib.rcParams["text.parse_math"] = False  # names of runs may contain "$"
    return import_optional("matplotlib.pyplot", extra="plot", needed_by=needed_by)


def save_figure(figure: Any, out: Path) -> None:
    """Write the figure. UserError if the path cannot be written."""
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {error}") from None


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """Average each value with equally many on either side, so that a falling curve does not lag.

    `window` counts the averaged values. The default grows with the number of values.
    """
    widest = min(MAX_HALF_WINDOW, len(values) // 40) if window is None else window // 2
    smoothed = []
    for i in range(len(values)):
        half = min(widest, i, len(values) - 1 - i)
        part = values[i - half : i + half + 1]
        smoothed.append(sum(part) / len(part))
    return smoothed


def draw_lines(axes: Any, lines: Sequence[Line]) -> None:
    """Draw unlabelled lines first, under the labelled ones, and the runs of means under all."""
    transforms = import_optional("matplotlib.transforms", extra="plot", needed_by="plotting")
    for line in sorted(lines, key=lambda line: line.label is not None):
        beside = transforms.ScaledTranslation(line.shift / 72, 0, axes.figure.dpi_scale_trans)
        marker = line.marker or ("o" if len(line.x) == 1 else "")
        shown = {"color": line.colour, "linestyle": line.style}
        if line.raw is not None:
            axes.plot(line.x, line.raw, color=line.colour, alpha=0.25, linewidth=1)
        for x, y in line.runs:
            (run,) = axes.plot(x, y, marker=marker if len(x) == 1 else "", **shown, **PALE)
            if len(x) == 1:
                run.set_transform(axes.transData + beside)
        (drawn,) = axes.plot(
            line.x,
            line.y,
            linewidth=line.width,
            marker=marker,
            markersize=4.5,
            label=line.label or "_nolegend_",
            **shown,
        )
        if not line.style:
            drawn.set_transform(axes.transData + beside)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    has_points = any(len(x) == 1 for line in lines for x, _ in line.runs)
    axes.margins(x=0.04 if has_points else 0.02)


def label_lines(figure: Any, axes: Any, lines: Sequence[Line]) -> None:
    """Name lines at their right ends if all names fit there, else in a legend outside the axes.

    Call it when the axes have their scales and labels.
    """
    named = [line for line in lines if line.label]
    if not named:
        return
    if _label_ends(figure, axes, lines, named):
        return
    handles, _ = axes.get_legend_handles_labels()
    order = sorted(range(len(named)), key=lambda i: -named[i].y[-1])  # as the lines end
    labels = [str(named[i].label) for i in order]
    longest, (width, height) = max(map(len, labels)), figure.get_size_inches()
    beside = longest <= LONGEST_BESIDE and longest * 0.065 + 0.6 < width / 3
    columns = 1 if beside else max(1, int(width / (longest * 0.065 + 0.6)))
    if not beside:
        figure.set_size_inches(width, height + 0.17 * math.ceil(len(labels) / columns))
    figure.legend(
        [handles[i] for i in order],
        labels,
        loc="outside right upper" if beside else "outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=LABEL_SIZE,
    )


def _label_ends(figure: Any, axes: Any, lines: Sequence[Line], named: Sequence[Line]) -> bool:
    """Write the names at the ends. Return False, and write nothing, if they would overlap."""
    if len(named) < len(lines) or max(len(str(line.label)) for line in named) > LONGEST_BESIDE:
        return False
    figure.draw_without_rendering()  # settles limits and layout
    box = axes.get_window_extent()
    ends = [axes.transData.transform((line.x[-1], line.y[-1])) for line in named]
    if any(x < box.x1 - 0.05 * box.width for x, _ in ends):
        return False
    height = LABEL_SIZE * 1.25 * figure.dpi / 72
    order = sorted(range(len(named)), key=lambda i: ends[i][1])
    places: list[float] = []
    for i in order:
        place = max(ends[i][1], places[-1] + height) if places else ends[i][1]
        if place - ends[i][1] > 0.8 * height:
            return False
        places.append(place)
    for i, place in zip(order, places, strict=True):
        axes.annotate(
            named[i].label,
            (1, (place - box.y0) / box.height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=named[i].colour,
            fontsize=LABEL_SIZE,
            annotation_clip=False,
        )
    return True


def plain_number(value: float, _position: int | None = None) -> str:
    """Format a tick: 0.25, 2000, 20k, 1.5M, 3B, 2e15; never an offset or a power of ten."""
    size = abs(value)
    if size >= 1e15:
        return f"{value:.4g}".replace("e+", "e")
    units = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    for least, unit, suffix in units:
        if size >= least:
            return f"{value / unit:.6g}{suffix}"
    return f"{value:.6g}"


def format_length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def set_plain_ticks(
    axis: Any, values: Sequence[float] | None = None, *, whole: bool = False
) -> None:
    """Format the ticks of an axis as plain numbers, after its scale and data are set.

    `values` are the only ticks, if given. `whole` ticks are integers. On a log axis over
    less than a decade, ticks are spread as on a linear one: powers of ten would be too few.
    """
    ticker = import_optional("matplotlib.ticker", extra="plot", needed_by="plotting")
    if values is not None:
        axis.set_major_locator(ticker.FixedLocator(list(values)))
    elif axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        if high < 10 * low:
            axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        else:
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    elif whole:
        axis.set_major_locator(ticker.MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_major_formatter(ticker.FuncFormatter(plain_number))
