"""Read runs, finished or not: their options, metrics, evaluations and state.

Nothing is written, and torch is not imported. A command's RUNS are dump_dirs of runs, folders of
runs and sweeps, or globs of these.
"""

from __future__ import annotations

import glob
import logging
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lingua.args import flatten_dict
from lingua.config.help import format_value
from lingua.errors import UserError
from lingua.evaluations import ENDED_BY, Evaluation, read_evaluations
from lingua.files.jsonl_log import read_jsonl_records
from lingua.files.lock import check_unlocked
from lingua.slurm.background import CONSEQUENCE, ERROR, MAX_SHOWN
from lingua.slurm.run_list import (
    RunOptions,
    differing,
    find_runs,
    is_run,
    read_options,
    read_record,
)

logger = logging.getLogger(__name__)

STEP = "global_step"
ABSENT = "unset"  # instead of the value of an option that a run lacks
LAUNCH_SECONDS = 60  # a run imports torch before it locks its folder
LOG_TAIL = 65_536  # bytes
RUN_ENDS = " - the run ends: "  # before an error in train.log


@dataclass
class Run:
    name: str
    path: Path
    options: RunOptions
    metrics: dict[str, dict[int, float | None]]  # by step; None was NaN or infinite
    evaluations: list[Evaluation]
    layout: str | None  # the table in its first record
    swept: list[str]  # options of its sweep
    ended: dict[int, str] = field(default_factory=dict)  # the option that ended it, by step

    def newest(self, key: str) -> tuple[int, float | None] | None:
        """Return the last step with this metric, and the value there."""
        return max(self.metrics[key].items()) if key in self.metrics else None

    @property
    def step(self) -> int:
        return max(self.metrics.get(STEP, {}), default=0)

    @cached_property
    def status(self) -> str:
        """Return "running", "finished", "failed", "stopped" or "waiting".

        A running run has locked its folder. A stopped run was interrupted or killed. A waiting run
        has not started.
        """
        try:
            check_unlocked("dump_dir", self.path)
        except UserError:
            return "running"
        if self.error is not None:
            return "failed"
        if self._has_all_steps:
            return "finished"
        has_started = self.options.has_started or self.metrics or self._was_launched
        return "stopped" if has_started else "waiting"

    @cached_property
    def error(self) -> str | None:
        """The error that ended the run, from train.log or the output of its ranks."""
        error = _logged_error(self.path / "train.log")
        return error if error or self._has_all_steps else _printed_error(self.path / "logs")

    @property
    def _was_launched(self) -> bool:
        jobs = [path.stat().st_mtime for path in self.path.glob("logs/*/")]
        return bool(jobs) and time.time() - max(jobs) > LAUNCH_SECONDS

    @property
    def _has_all_steps(self) -> bool:
        steps = self.options.current.get("steps")
        return self.step in self.ended or (isinstance(steps, int) and self.step >= steps)


def _logged_error(log: Path) -> str | None:
    """Return the error at the end of train.log, unless it is Ctrl-C."""
    _, found, end = _tail(log).rpartition(RUN_ENDS)
    first, *others = end.splitlines() or [""]
    is_last = all(line.startswith("    ") for line in others)  # the lines of a traceback
    return first[:MAX_SHOWN] if found and is_last and first != "KeyboardInterrupt" else None


def _printed_error(logs: Path) -> str | None:
    """Return the last error that a rank of the newest job printed."""
    jobs = sorted(logs.glob("*/"), key=lambda path: path.stat().st_mtime)
    for file in sorted(jobs[-1].glob("*.err")) if jobs else []:
        for line in reversed(_tail(file).splitlines()):
            if ERROR.match(line) and not CONSEQUENCE.search(line):
                return line.removeprefix("error: ")[:MAX_SHOWN]
    return None


def _tail(file: Path) -> str:
    if not file.is_file():
        return ""
    with open(file, "rb") as log:
        log.seek(max(0, file.stat().st_size - LOG_TAIL))
        return log.read().decode("utf-8", "replace")


# ---- reading


def runs_of(path: Path) -> list[tuple[str, Path]]:
    """Return the name and folder of the run, or of all runs in the folder."""
    runs = {} if not path.is_dir() or _is_run(path) else find_runs(path)
    return list(runs.items()) or [(path.resolve().name, path)]


def _is_run(path: Path) -> bool:
    return is_run(path) or (path / "metrics.jsonl").exists()


def read_runs(given: Sequence[str | Path]) -> list[Run]:
    """Read runs, and all runs in folders of runs. Other files and folders are skipped."""
    found: dict[Path, tuple[str, Path]] = {}
    for text in map(str, given):
        paths = [text] if os.path.exists(text) else sorted(glob.glob(text))
        if not paths:
            raise UserError(f"{text} does not exist; name a run's dump_dir, or a folder of runs")
        runs = [run for path in paths for run in runs_of(Path(path)) if _is_run(run[1])]
        for name, path in runs:
            found.setdefault(path.resolve(), (name, path))
        if not runs and len(given) > 1 and os.path.isdir(text):
            logger.warning("skipped %s: no run in it", text)
    if not found:
        raise UserError(
            f"{', '.join(map(str, given))}: no run in it; name a run's dump_dir (it has a "
            "config.yaml), or a folder of runs"
        )
    names = [name for name, _ in found.values()]
    return [
        _read_run(name if names.count(name) == 1 else str(path), path)
        for name, path in found.values()
    ]


def _read_run(name: str, path: Path) -> Run:
    metrics: dict[str, dict[int, float | None]] = {}
    ended: dict[int, str] = {}
    layout, file = None, path / "metrics.jsonl"
    for record in read_jsonl_records(file) if file.is_file() else []:
        layout = record.get("model/layout", layout)
        step = record.get(STEP)
        if ENDED_BY in record and step is not None:
            ended[step] = record[ENDED_BY]
        for key, value in record.items():
            if step is not None and (value is None or type(value) in (int, float)):
                metrics.setdefault(key, {})[step] = value
    evaluations = read_evaluations(path) if path.is_dir() else []
    for evaluation in evaluations:
        if not evaluation.label and evaluation.step is not None:  # with the run's own options
            for key, score in evaluation.scores.items():
                metrics.setdefault(key, {}).setdefault(evaluation.step, score)
    record = read_record(path.absolute().parent)
    swept = flatten_dict(record.get(path.name, {}), sep=".")
    axes = {o for run in record.values() for o in flatten_dict(run, sep=".")} if swept else {}
    options = read_options(path)
    # A sweep leaves out an option that does not apply, whose default would look like a choice.
    current = {o: v for o, v in (swept | options.current).items() if o in swept or o not in axes}
    options = replace(options, current=current, requested=swept | options.requested)
    return Run(name, path, options, metrics, evaluations, layout, list(swept), ended)


def warn_skipped(names: Sequence[str], why: str) -> None:
    if names:
        logger.warning("skipped %s: %s", list_names(names, 3), why)


# ---- options


def differing_options(runs: Sequence[Run]) -> list[str]:
    """List swept options, and others that somebody chose differently. The seed is the last."""
    swept = dict.fromkeys(option for run in runs for option in run.swept)
    found = dict.fromkeys([*swept, *differing([run.options for run in runs])])
    return sorted(found, key=lambda option: option == "seed")


def implied_options(
    runs: Sequence[Run], differing: Sequence[str], averaged: Collection[str] = ()
) -> set[str]:
    """Return options that a sweep did not set, but that follow from those it set.

    These are options that match= changes, and options of the config that some runs leave out.
    """
    swept = {option for run in runs for option in run.swept}
    fixed = [option for option in differing if option in swept and option not in averaged]
    implied = set()
    for option in [option for option in differing if option not in swept]:
        by_sweep: dict[Path, set[str]] = {}
        by_values: dict[tuple[Path | str, ...], set[str]] = {}
        for run in runs:
            sweep, text = (
                run.path.absolute().parent if run.swept else run.path,
                option_text(run, option),
            )
            by_sweep.setdefault(sweep, set()).add(text)
            values = (option_text(run, other) for other in fixed)
            by_values.setdefault((sweep, *values), set()).add(text)
        varies = any(len(texts) > 1 for texts in by_sweep.values())
        if varies and all(len(texts) == 1 for texts in by_values.values()):
            implied.add(option)
    return implied


def short_option(option: str) -> str:
    """Return lr for optim.lr, and gdn.head_dim for model.gdn.head_dim."""
    _, _, end = option.partition(".")
    return end or option


def option_text(run: Run, option: str) -> str:
    return format_value(run.options.current.get(option, ABSENT))


def grouped(runs: Sequence[Run], options: Sequence[str]) -> list[tuple[dict[str, str], list[Run]]]:
    """Group runs by the values of options, in the order of these values."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(option_text(run, o) for o in options), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: [natural_key(text) for text in item[0]])
    return [(dict(zip(options, key, strict=True)), members) for key, members in ordered]


def natural_key(text: str) -> tuple[bool, float, str]:
    """Sort numbers by value, before words."""
    number = as_number(text)
    return number is None, number or 0.0, text


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ---- names, which may be shortened to their end: mixer for model.mixer, val for loss/val


def full_name(name: str, known: Collection[str], separator: str) -> list[str]:
    """Return `name` if it is known, else the known names that end with it."""
    if name in known:
        return [name]
    return [known_name for known_name in known if known_name.endswith(separator + name)]


def find_option(
    setting: str, name: str, runs: Sequence[Run], differ: Collection[str], hint: str = ""
) -> str:
    """Resolve a shortened option. One that differs between the runs is preferred."""
    known = {option for run in runs for option in run.options.current}
    found = full_name(name, differ, ".") or full_name(name, known, ".")
    if not found:
        raise UserError(f"{setting}={name}: no run has this option; {say_differing(differ)}{hint}")
    return only(setting, name, found)


def only(setting: str, name: str, found: Sequence[str]) -> str:
    if len(found) > 1:
        raise UserError(f"{setting}={name} is one of {', '.join(found)}; use the full name")
    return found[0]


def say_differing(differ: Collection[str]) -> str:
    if not differ:
        return "no option differs between these runs"
    return f"these differ between the runs: {list_names(differ)}"


def list_names(names: Collection[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more
