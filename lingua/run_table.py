"""The table of `python -m lingua.sweep`: a row for each run, or for each group of runs.

Columns have full names, such as model.mixer, which columns=, sort= and mean= may shorten to their
end. In a terminal, the least important columns are dropped until the others fit.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lingua.config.help import format_value
from lingua.errors import UserError
from lingua.files.jsonl_log import json_line
from lingua.run_columns import (
    VAL,
    At,
    Column,
    Mean,
    Short,
    combine,
    default_columns,
    newest,
    option_column,
    plain,
)
from lingua.runs import (
    Run,
    differing_options,
    find_option,
    full_name,
    grouped,
    list_names,
    natural_key,
    only,
    say_differing,
    warn_skipped,
)

logger = logging.getLogger(__name__)

FORMATS = ("table", "csv", "json", "markdown")
WIDTH = 100  # characters, if the output is not a terminal and COLUMNS is not set
MAX_ERRORS = 3  # different ones that are shown


# ---- the table


@dataclass
class Table:
    runs: list[Run]  # for the notes below it; may be empty
    columns: list[Column]


def build_table(
    runs: list[Run],
    *,
    columns: str = "",
    sort: str = "",
    mean: str = "",
    is_named: bool = False,
) -> Table:
    """Build the table of runs. Arguments are comma-separated names; "" is the default.

    `mean`: options to average over. `sort`: columns, with "-" in front for falling values.
    `is_named`: keep the column of names if the options of a sweep name the runs.
    """
    differ = differing_options(runs)
    averaged = [find_option("mean", name, runs, differ) for name in _names(mean)]
    for option in set(averaged) - set(differ):
        logger.warning("mean=%s has no effect: %s", option, say_differing(differ))
    options = [option for option in differ if option not in averaged]
    known = default_columns(runs, options)
    groups = [members for _, members in grouped(runs, options)]
    findable = known
    if averaged:
        findable = known = known[1:]
        known.insert(len(options), Column("n", lambda run: 1, str))
    else:
        groups = [[run] for members in groups for run in members]
        names = {known[0].value(run).text for run in runs}
        if "run" in _names(columns):
            known[0].value = lambda run: Short(run.name, run.name)
        elif len(names) == 1 < len(runs) and not is_named:
            known = known[1:]  # all runs are of one sweep
        elif len(names) > 1:
            groups.sort(key=lambda members: natural_key(known[0].value(members[0]).text))
    keys = [(name.startswith("-"), name.removeprefix("-")) for name in _names(sort)]
    sorted_by = [find_column("sort", name, findable, runs, options) for _, name in keys]
    shown = [find_column("columns", name, findable, runs, options) for name in _names(columns)]
    shown = shown or known
    for column in {id(c): c for c in [*shown, *sorted_by]}.values():
        column.cells = [combine(column, members) for members in groups]
        if column.name == "n":
            column.cells = [len(members) for members in groups]
    order = list(range(len(groups)))
    for (is_falling, _), column in reversed(list(zip(keys, sorted_by, strict=True))):
        texts = [format_value(getattr(cell, "value", cell)) for cell in column.cells]
        order.sort(key=lambda i, t=texts: natural_key(t[i]), reverse=is_falling)
        # missing values and NaN are the last
        order.sort(key=lambda i, c=column, t=texts: c.cells[i] is None or t[i] == "nan")
    for column in {id(c): c for c in shown}.values():
        column.cells = [column.cells[i] for i in order]
    if averaged:
        warn_of_means(groups, shown)
    return Table(runs, shown)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def find_column(
    setting: str, name: str, known: Sequence[Column], runs: Sequence[Run], options: Sequence[str]
) -> Column:
    """Find a column by its name or header, or make one for an option or a metric of the runs."""
    for column in known:
        if name in (column.name, column.header):
            return column
    if name == "run":  # not the option profiling.run
        raise UserError(f"{setting}=run: a row of mean= has several runs; leave out one of them")
    titles = [column.name for column in known if column.name.startswith(f"{name} ")]
    all_options = {option for run in runs for option in run.options.current}
    metrics = {key for run in runs for key in run.metrics}
    if titles:
        return next(c for c in known if c.name == only(setting, name, titles))
    if found := full_name(name, options, ".") or full_name(name, all_options, "."):
        return option_column(only(setting, name, found), [])
    if found := full_name(name, metrics, "/"):
        key = only(setting, name, found)
        return Column(key, newest(key), plain, is_measured=True)
    raise UserError(
        f"{setting}={name}: no run has this column; use "
        f"{list_names([column.header or column.name for column in known], 20)}, or another option "
        "or metric of the runs"
    )


def warn_of_means(groups: Sequence[Sequence[Run]], columns: Sequence[Column]) -> None:
    """Warn if a mean mixes steps, or leaves out diverged runs."""
    members = [run for group in groups if len(group) > 1 for run in group]
    for column in columns:
        if column.name == "val":
            diverged = [run.name for run in members if column.value(run) is math.nan]
            warn_skipped(diverged, "its last val is NaN or infinite")
    ends = [{found[0] for run in group if (found := run.newest(VAL))} for group in groups]
    if mixed := set().union(*(steps for steps in ends if len(steps) > 1)):
        logger.warning(
            "means are of different steps, %d to %d: some runs are shorter or still running",
            *(min(mixed), max(mixed)),
        )


# ---- output


def format_as(table: Table, form: str) -> str:
    """Format a table for a terminal, or with all its columns as csv, json or markdown."""
    if form == "table":
        return format_for_terminal(table)
    if form == "markdown":
        texts = [[column.text(cell) for cell in column.cells] for column in table.columns]
        heads = [column.header or column.name for column in table.columns]
        rules = ["---" if column.least else "---:" for column in table.columns]
        rows = [heads, rules, *zip(*texts, strict=True)]
        return "\n".join(
            f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in rows
        )
    values = plain_columns(table)
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    if form == "json":
        return "[\n" + ",\n".join(json_line(row).rstrip() for row in rows) + "\n]"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(values)
    writer.writerows(["" if v is None else format_value(v) for v in row.values()] for row in rows)
    return text.getvalue().rstrip("\n")


def plain_columns(table: Table) -> dict[str, list[Any]]:
    """Return the values by name; standard deviations, counts and steps are further columns."""
    values: dict[str, list[Any]] = {}
    for column in table.columns:
        values[column.name] = [getattr(cell, "value", cell) for cell in column.cells]
        further = [("step", At, "step")]
        if column.is_measured:
            further += [("std", Mean, "std"), ("n", Mean, "n")]
        for name, kind, attribute in further:
            if any(isinstance(cell, kind) for cell in column.cells):
                values[f"{column.name} {name}"] = [
                    getattr(cell, attribute, None) for cell in column.cells
                ]
    return values


COLOURS = {"finished": "green", "running": "yellow", "failed": "red", "stopped": "red"}


def format_for_terminal(table: Table) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    width = shutil.get_terminal_size((WIDTH, 24)).columns
    shown, widths, gap = fit(table.columns, width)
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, gap - 1, 0, 0))
    for column, size in zip(shown, widths, strict=True):
        justify = "left" if column.least else "right"
        header = Text("\n".join(split_header(column.header or column.name, size)))
        drawn.add_column(
            header,
            justify=justify,
            width=size,
            overflow="fold",
            vertical="bottom",  # type: ignore
        )
    for cells in zip(*(column.cells for column in shown), strict=True):
        row = []
        for column, cell, size in zip(shown, cells, widths, strict=True):
            text = column.text(cell)
            if column.name == "layout" and len(text) > size:
                text = f"{text[: size - 1]}…"
            style = COLOURS.get(cell.value, "") if column.name == "status" else ""
            row.append(Text(text, style=style))
        drawn.add_row(*row)
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(drawn)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    lines += [textwrap.fill(note, width) for note in notes(table, shown, width)]
    return "\n".join(lines)


def notes(table: Table, shown: Sequence[Column], width: int) -> Iterator[str]:
    counts = Counter(run.status for run in table.runs)
    states = ", ".join(f"{count} {name}" for name, count in counts.items())
    if counts:
        yield f"{len(table.runs)} runs: {states}" if len(table.runs) > 1 else f"1 run: {states}"
    failed: dict[str, list[str]] = {}
    for run in table.runs:
        if run.status == "failed":
            failed.setdefault(str(run.error), []).append(run.name)
    for error, names in list(failed.items())[:MAX_ERRORS]:
        yield f"failed: {list_names(names, 1)}: {error}"
    hidden = sorted((c for c in table.columns if c not in shown), key=lambda column: column.rank)
    if hidden:
        names = list_names([column.header or column.name for column in hidden])
        hint = " (see columns=, format=csv)" if table.runs else ""
        yield f"not shown, for a width of {width}: {names}{hint}"


def split_header(name: str, size: int) -> list[str]:
    """Break a header after "_", ".", "/" and spaces into lines of at most `size` characters."""
    lines = [""]
    for part in re.findall(r"[^_./ ]*[_./ ]?", name) if len(name) > 6 else [name]:
        if lines[-1] and len((lines[-1] + part).rstrip()) > size:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def fit(columns: Sequence[Column], width: int) -> tuple[list[Column], list[int], int]:
    """Choose columns, their widths and the gap between them, so that they fit if possible."""
    full, least = {}, {}
    for column in columns:
        parts = split_header(column.header or column.name, 1)
        cells = max((len(column.text(cell)) for cell in column.cells), default=1)
        full[id(column)] = max(cells, *map(len, parts))
        smallest = max(min(cells, column.least), *map(len, parts))
        least[id(column)] = smallest if column.least else full[id(column)]
    shown = list(columns)

    def need(sizes: dict[int, int], gap: int) -> int:
        return sum(sizes[id(column)] for column in shown) + gap * (len(shown) - 1) + gap - 1

    # First without details, then with short texts, then without the less important columns.
    while (last := max(shown, key=lambda column: column.rank)).rank > 0:
        if need(full if last.rank >= 10 else least, 1) <= width:
            break
        shown.remove(last)
    gap = 2 if need(full, 2) <= width else 1
    sizes = [min(least[id(column)], full[id(column)]) for column in shown]
    spare = width - need(least, gap)
    while spare > 0 and (short := [i for i, c in enumerate(shown) if sizes[i] < full[id(c)]]):
        sizes[min(short, key=sizes.__getitem__)] += 1
        spare -= 1
    return shown, sizes, gap
