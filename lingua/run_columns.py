"""The columns of a table of runs: their values, and how they are written.

Scores of evaluations have columns as well, named after the task and the options of the evaluation.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lingua.config.help import format_value
from lingua.evaluations import Evaluation
from lingua.runs import STEP, Run, option_text, short_option

VAL = "loss/val"
# Options that stay in a narrow table, after swept ones, if they differ; then others of the model.
FIRST = ("model.loop_count", "model.mixer", "model.dim", "optim.lr", "data.seq_len", "steps")
EVAL_TITLES = {VAL: "eval val", "loss/val_bpb": "eval bpb", "acc/val": "eval acc"}


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
    rank: float = 0  # the highest is dropped first; 0 stays
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
            digits = min(max(1 - math.floor(math.log10(cell.std)), 0), 4) if cell.std else 0
            if not cell.std:
                text += "±0"
            elif abs(cell.value) < 1e-3:
                text += f"±{cell.std:.2g}"
            else:
                text = f"{cell.value:.{digits}f}±{cell.std:.{digits}f}"
        if not self.is_measured:
            return f"~{text}" if cell.std else text
        return f"{text} (n={cell.n})" if cell.n < cell.of else text


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

    swept = {option for run in runs for option in run.swept}
    is_sweep = all(run.swept for run in runs)

    def importance(option: str) -> tuple[bool, int, bool]:
        place = FIRST.index(option) if option in FIRST else len(FIRST)
        return option not in swept, place, not option.startswith("model.")

    places = {option: i for i, option in enumerate(sorted(options, key=importance))}

    def rank(option: str) -> float:
        if is_sweep and option not in swept:
            return 9  # it follows from the others, as what match= changes
        place = places[option]
        return 0 if place < len(FIRST) else (3 if option in swept else 9) + place / 1000

    columns = [
        Column("run", name, lambda cell: cell.text, least=16),
        *(option_column(option, options, rank(option)) for option in options),
        Column("status", status, lambda cell: cell.text, 1, least=8),
        Column("layout", layout, str, 5, least=8),
        Column("parameters", newest("model/parameters"), short, 2, "params"),
        Column("flops", newest("optim/total_flops"), scientific, 3, "FLOPs"),
        Column("tokens", newest("optim/total_tokens"), short, 6),
        Column("step", newest(STEP), plain, 12),
        Column("loss", newest("loss/out"), plain, 11 if has_val else 0, is_measured=True),
        Column("val", final(VAL), plain, is_measured=True),
        Column("best", best, plain, 4, is_measured=True),
        Column("acc", final("acc/val"), plain, 5, is_measured=True),
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


def option_column(option: str, among: Sequence[str], rank: float = 0) -> Column:
    """`among` are all options with a column. The header is short unless two would be equal."""
    short_name = short_option(option)
    is_unique = sum(short_option(other) == short_name for other in among) <= 1

    def value(run: Run) -> Option | None:
        current = run.options.current
        return Option(current[option]) if option in current else None

    header = short_name if is_unique else option
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
        title = EVAL_TITLES.get(key) if evaluation.label else None
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
