"""Read the metrics and options of runs, and find both by shortened names."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lingua.config.help import format_value
from lingua.errors import UserError
from lingua.evaluations import read_evaluations
from lingua.files.jsonl_log import read_jsonl_records
from lingua.slurm.run_list import PER_RUN, RunOptions, find_runs, is_run, read_options

logger = logging.getLogger(__name__)

STEP = "global_step"
AXES = {  # x= to the metric
    "steps": STEP,
    "tokens": "optim/total_tokens",
    "flops": "optim/total_flops",
    "seconds": "time/elapsed",
}


@dataclass
class Run:
    name: str
    path: Path
    options: RunOptions
    metrics: dict[str, dict[int, float | None]]  # by step; None was NaN or infinite


def runs_of(path: Path) -> list[tuple[str, Path]]:
    """Return the name and folder of the run, or of all runs in the folder."""
    runs = {}
    if path.is_dir() and not is_run(path) and not (path / "metrics.jsonl").exists():
        runs = find_runs(path)
    return list(runs.items()) or [(path.resolve().name, path)]


def read_runs(given: Sequence[Path]) -> list[Run]:
    """Read runs, and all runs in folders of runs. Runs without metrics are skipped."""
    runs, without = [], []
    for name, path in dict.fromkeys(run for folder in given for run in runs_of(folder)):
        if not path.exists():
            raise UserError(f"{path} does not exist; name a run's dump_dir, or a folder of runs")
        metrics = read_metrics(path)
        if metrics:
            runs.append(Run(name, path, read_options(path), metrics))
        else:
            without.append(name)
    if not runs:
        raise UserError(
            f"{', '.join(map(str, given))}: no run with a metrics.jsonl; "
            "name a run's dump_dir, or a folder of runs"
        )
    warn_skipped(without, "no metrics.jsonl yet")
    return runs


def read_metrics(run: Path) -> dict[str, dict[int, float | None]]:
    """Map metrics to their values by step. Evaluations count if made with the run's own options."""
    metrics: dict[str, dict[int, float | None]] = {}
    file = run / "metrics.jsonl"
    for record in read_jsonl_records(file) if file.is_file() else []:
        step = record.get(STEP)
        for key, value in record.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if step is not None and (is_number or value is None):
                metrics.setdefault(key, {})[step] = value
    for evaluation in read_evaluations(run) if run.is_dir() else []:
        if not evaluation.label and evaluation.step is not None:
            for key, score in evaluation.scores.items():
                metrics.setdefault(key, {}).setdefault(evaluation.step, score)
    return metrics


def warn_skipped(names: Sequence[str], why: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        logger.warning("skipped %s: %s", shown, why)


def full_name(name: str, known: Collection[str], separator: str) -> list[str]:
    """Return `name` if it is known, else the known names that end with it."""
    if name in known:
        return [name]
    return [known_name for known_name in known if known_name.endswith(separator + name)]


def find_metric(y: str, runs: Sequence[Run]) -> str:
    known = sorted({key for run in runs for key in run.metrics} - {STEP, "acc_step"})
    found = full_name(y, known, "/")
    if not found:
        raise UserError(f"y={y}: no run has this metric; use {_listed(known)}")
    if len(found) > 1:
        raise UserError(f"y={y} is one of {', '.join(found)}; use the full name")
    return found[0]


def find_option(setting: str, name: str, runs: Sequence[Run], differing: Collection[str]) -> str:
    """Resolve a shortened option. One that differs between the runs is preferred."""
    known = {option for run in runs for option in run.options.current}
    found = full_name(name, differing, ".") or full_name(name, known, ".")
    if not found:
        others = f"; {'/'.join(AXES)} work too" if setting == "x" else ""
        raise UserError(
            f"{setting}={name}: no run has this option; {say_differing(differing)}{others}"
        )
    if len(found) > 1:
        raise UserError(f"{setting}={name} is one of {', '.join(found)}; use the full name")
    return found[0]


def say_differing(differing: Collection[str]) -> str:
    if not differing:
        return "no option differs between these runs"
    return f"these differ between the runs: {_listed(differing)}"


def _listed(names: Collection[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def differing_options(runs: Sequence[Run]) -> list[str]:
    """List the options that differ and were asked to differ, unlike values derived from others."""

    def differs(option: str) -> bool:
        current = {format_value(o.current[option]) for o in options if option in o.current}
        asked = {
            format_value(o.requested[option]) if option in o.requested else "" for o in options
        }
        return len(current) > 1 and len(asked) > 1

    options = [run.options for run in runs]
    known = dict.fromkeys(option for o in options for option in o.current)
    found = [option for option in known if option not in PER_RUN and differs(option)]
    return sorted(found, key=lambda option: option == "seed")  # the last in a label


def with_metric(runs: Sequence[Run], key: str, setting: str) -> list[Run]:
    """Return the runs that have the metric. UserError if none has it."""
    if key == STEP:
        return list(runs)
    have = [run for run in runs if any(v is not None for v in run.metrics.get(key, {}).values())]
    if not have:
        axes = [name for name, k in AXES.items() if any(k in run.metrics for run in runs)]
        works = f"; x={' or x='.join(axes)} works" if setting.startswith("x") else ""
        raise UserError(f"{setting}: no run has a finite {key}{works}")
    warn_skipped([run.name for run in runs if run not in have], f"no finite {key} ({setting})")
    return have
