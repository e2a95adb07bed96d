"""The table of `python -m lingua.sweep`: a row for each run, or for each group of runs.

Columns have full names, such as model.mixer, which columns=, sort= and mean= may shorten to their
end. In a terminal, the least important columns are left out until the others fit.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import math
import re
import shutil
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lingua.config.help import format_value
from lingua.errors import UserError
from lingua.evaluations import Evaluation
from lingua.files.jsonl_log import json_line
from lingua.runs import (
    STEP,
    Run,
    differing_options,
    find_option,
    full_name,
    grouped,
    list_names,
    natural_key,
    only,
    option_text,
    say_differing,
    warn_skipped,
)

logger = logging.getLogger(__name__)

FORMATS = ("table", "csv", "json", "markdown")
WIDTH = 100  # characters, if the output is no terminal and COLUMNS is not set
MAX_ERRORS = 3  # different ones that are shown
VAL = "loss/val"


# ---- cells


class Option(NamedTuple):
    value: Any


class Short(NamedTuple):
    value: str
    text: str  # for the table


class At(NamedTuple):
    """A score of a step that is not the newest of its run."""

    value: float
    step: int


class Mean(NamedTuple):
    value: float
    std: float | None  # None of one value
    n: int
    of: int  # runs in the group


@dataclass
class Column:
    name: str
    value: Callable[[Run], Any]
    show: Callable[[Any], str]
    rank: int = 0  # the highest is left out first; 0 stays
    header: str = ""
    least: int = 0  # characters that a text may be cut or folded to; 0: a number
    is_measured: bool = False  # a mean has a standard deviation
    cells: list[Any] = field(default_factory=list)

    def text(self, cell: Any) -> str:
        if cell is None:
            return "-"
        if isinstance(cell, Mean):
            return self._text_of_mean(cell)
        at = f" @{cell.step}" if isinstance(cell, At) else ""
        return self.show(cell.value if isinstance(cell, At) else cell) + at

    def _text_of_mean(self, cell: Mean) -> str:
        text = self.show(cell.value)
        if cell.std is not None and self.is_measured:
            digits = 4 if not cell.std else min(max(1 - math.floor(math.log10(cell.std)), 0), 4)
            text = f"{cell.value:.{digits}f}±{cell.std:.{digits}f}"
        return f"{text} (n={cell.n})" if self.is_measured and cell.n < cell.of else text


def combine(column: Column, members: Sequence[Run]) -> Any:
    """Return the cell of a group of runs."""
    values = [value for run in members if (value := column.value(run)) is not None]
    if len(members) == 1 or not values:
        return values[0] if values else None
    if column.name == "status":
        states = [cell.value for cell in values]
        n_done = states.count("finished")
        text = states[0] if len(set(states)) == 1 else f"{n_done}/{len(states)} done"
        return Short(text, text)
    if isinstance(values[0], str | Option):
        varies = "varies" if isinstance(values[0], str) else Option("varies")
        return values[0] if len({str(value) for value in values}) == 1 else varies
    numbers = [value.value if isinstance(value, At) else value for value in values]
    finite = [number for number in numbers if math.isfinite(number)]
    if not finite:
        return math.nan
    std = statistics.stdev(finite) if len(finite) > 1 else None
    mean = finite[0] if len(set(finite)) == 1 else statistics.fmean(finite)
    return Mean(mean, std, len(finite), len(members))


# ---- columns


def plain(number: float) -> str:
    if isinstance(number, int):
        return str(number)
    return f"{number:.4f}" if 1e-3 <= abs(number) < 1e3 or number == 0 else f"{number:.4g}"


def short(number: float) -> str:
    """Write 1234567 as 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.3g}"


def scientific(number: float) -> str:
    """Write 1234567 as 1.2e6."""
    mantissa, _, exponent = f"{number:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def newest(key: str) -> Callable[[Run], Any]:
    def value(run: Run) -> float | None:
        found = run.newest(key)
        return None if found is None else math.nan if found[1] is None else found[1]

    return value


def final(key: str) -> Callable[[Run], Any]:
    """Like `newest`, with the step of a score that is older than the end of the run."""

    def value(run: Run) -> float | At | None:
        found, score = run.newest(key), newest(key)(run)
        is_older = found is not None and found[0] != run.step and run.status != "running"
        return At(score, found[0]) if found and is_older else score

    return value


def best(run: Run) -> float | None:
    return min((v for v in run.metrics.get(VAL, {}).values() if v is not None), default=None)


def status(run: Run) -> Short:
    steps = run.options.current.get("steps")
    share = f"run {run.step / steps:.0%}" if isinstance(steps, int) and steps else "running"
    return Short(run.status, share if run.status == "running" else run.status)


def layout(run: Run) -> str | None:
    return run.layout and shorten_layout(run.layout)


def default_columns(runs: Sequence[Run], options: Sequence[str]) -> list[Column]:
    """Return the columns that have a value in some run, in their order in the table."""
    has_val = any(VAL in run.metrics for run in runs)
    texts = {(_sweep(run), *(option_text(run, o) for o in options)) for run in runs}
    is_unique = len(texts) == len(runs)  # names would repeat the options

    def name(run: Run) -> Short:
        return Short(run.name, is_unique and _sweep(run) or run.name)

    columns = [
        Column("run", name, lambda cell: cell.text, least=16),
        *(option_column(option, options, 3 * (i >= 6)) for i, option in enumerate(options)),
        Column("status", status, lambda cell: cell.text, 1, least=8),
        Column("layout", layout, str, 5, least=8),
        Column("parameters", newest("model/parameters"), short, 2, "params"),
        Column("flops", newest("optim/total_flops"), scientific, 3, "FLOPs"),
        Column("tokens", newest("optim/total_tokens"), short, 6),
        Column("step", newest(STEP), plain, 12),
        Column("loss", newest("loss/out"), plain, 11 if has_val else 0, is_measured=True),
        Column("val", final(VAL), plain, is_measured=True),
        Column("best", best, plain, 4, is_measured=True),
        Column("bpb", final("loss/val_bpb"), plain, 13, is_measured=True),
        Column("tokens/s", newest("speed/tokens_per_s"), short, 7, "tok/s"),
    ]
    titles = dict.fromkeys(title for run in runs for title in scores(run))
    columns += [
        Column(title, lambda run, title=title: scores(run).get(title), plain, 10, is_measured=True)
        for title in titles
    ]
    return [c for c in columns if any(c.value(run) is not None for run in runs)]


def _sweep(run: Run) -> str:
    return run.path.absolute().parent.name if run.swept else ""


def option_column(option: str, among: Sequence[str], rank: int = 0) -> Column:
    """`among` are all options with a column; a header is the shortest unique end of its name."""
    last = option.rpartition(".")[2]
    is_unique = sum(other.rpartition(".")[2] == last for other in among) <= 1

    def value(run: Run) -> Option | None:
        current = run.options.current
        return Option(current[option]) if option in current else None

    header = last if is_unique else option
    return Column(option, value, lambda cell: format_value(cell.value), rank, header, least=9)


def scores(run: Run) -> dict[str, float | At]:
    """Map titles to the newest scores of apps.LT2.eval, except the validation loss of the run.

    A title names the options that are not the run's own, and the chance level. A score of a step
    that is not the newest of training names its step.
    """
    found: dict[str, float | At] = {}
    for evaluation in sorted(run.evaluations, key=lambda e: e.step or 0):
        for title, score in _titled(evaluation):
            step = evaluation.step
            found[title] = score if step in (None, run.step) else At(score, step)
    return found


def _titled(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """Yield validation losses with other options, and the first metric of each task."""
    seen = set()
    for key, score in evaluation.scores.items():
        task, _, metric = key.rpartition("/")
        name = metric.partition(",")[0]
        title = {VAL: "eval val", "loss/val_bpb": "eval bpb"}.get(key) if evaluation.label else None
        if "," in metric and task not in seen and not name.endswith("_stderr"):
            seen.add(task)
            level = evaluation.chance.get(f"{task}/{name}")
            title = f"{task} {name}" + ("" if level is None else f" (chance {level:.2g})")
        if title is not None:
            yield f"{title} {evaluation.label}".rstrip(), score


LOOP = re.compile(r"(loops? [\d-]+)(\*?) +(.*)")
LEGEND = re.compile(r"(\S) (\S+) \(\d+\)")


def shorten_layout(table: str) -> str:
    """Return a layout such as "gdn*4,full" from the table that a run records.

    A cycle is written once, different loops are separated by "->".
    """
    loops: dict[str, str] = {}
    names: dict[str, str] = {}
    for line in table.splitlines():
        if row := LOOP.match(line):
            prefix = "random " if row[2] and row[1] not in loops else ""
            loops[row[1]] = loops.get(row[1], prefix) + row[3].replace(" ", "")
        else:
            names |= dict(LEGEND.findall(line))
    return "->".join(_shorten_loop(letters, names) for letters in loops.values())


def _shorten_loop(letters: str, names: dict[str, str]) -> str:
    prefix, _, letters = letters.rpartition(" ")
    n = len(letters)
    cycles = (i for i in range(1, n // 2 + 1) if letters == (letters[:i] * n)[:n])
    groups = itertools.groupby(letters[: next(cycles, n)])
    counts = [(names.get(letter, letter), len(list(group))) for letter, group in groups]
    items = [f"{name}*{count}" if count > 1 else name for name, count in counts]
    return " ".join([prefix, ",".join(items)]).strip()


# ---- the table


@dataclass
class Table:
    runs: list[Run]
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
    if averaged:
        known = known[1:]
        known.insert(len(options), Column("n", lambda run: 1, str))
    else:
        groups = [[run] for members in groups for run in members]
        names = {known[0].value(run).text for run in runs}
        if len(names) == 1 < len(runs) and not is_named:
            known = known[1:]  # all runs are of one sweep
        elif len(names) > 1:
            groups.sort(key=lambda members: natural_key(members[0].name))
    keys = [(name.startswith("-"), name.removeprefix("-")) for name in _names(sort)]
    sorted_by = [find_column("sort", name, known, runs, options) for _, name in keys]
    shown = [find_column("columns", name, known, runs, options) for name in _names(columns)]
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
    titles = [column.name for column in known if column.name.startswith(f"{name} ")]
    all_options = {option for run in runs for option in run.options.current}
    metrics = {key for run in runs for key in run.metrics}
    if titles:
        return next(c for c in known if c.name == only(setting, name, titles))
    if found := full_name(name, options, ".") or full_name(name, all_options, "."):
        return option_column(only(setting, name, found), [])
    if found := full_name(name, metrics, "/"):
        key = only(setting, name, found)
        return Column(key, newest(key), plain, is_measured=key.startswith("loss"))
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
    steps = {found[0] for run in members if (found := run.newest(VAL))}
    if len(steps) > 1:
        logger.warning(
            "means are of different steps, %d to %d: some runs are shorter or still running",
            *(min(steps), max(steps)),
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
    yield f"{len(table.runs)} runs: {states}" if len(table.runs) > 1 else f"1 run: {states}"
    failed: dict[str, list[str]] = {}
    for run in table.runs:
        if run.status == "failed":
            failed.setdefault(str(run.error), []).append(run.name)
    for error, names in list(failed.items())[:MAX_ERRORS]:
        yield f"failed: {list_names(names, 1)}: {error}"
    hidden = [c.header or c.name for c in table.columns if c not in shown]
    if hidden:
        yield f"left out to fit a width of {width}: {', '.join(hidden)} (see columns=, format=csv)"


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
