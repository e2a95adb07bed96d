"""Find the metric and the runs that a plot shows."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from apps.LT2.scripts.loop_points import DEPTH, FLOPS, LOOP, LOOPS, scores_by_loop
from lingua import runs as reading
from lingua.errors import UserError
from lingua.runs import STEP, Run, full_name, list_names, only, warn_skipped

logger = logging.getLogger(__name__)

AXES = {  # x= to the metric
    "steps": STEP,
    "tokens": "optim/total_tokens",
    "flops": "optim/total_flops",
    "seconds": "time/elapsed",
}
# Plots over the same kind of x have the same metrics. Options have no kind.
KINDS = {LOOPS: LOOPS, FLOPS: LOOPS, LOOP: LOOP, DEPTH: DEPTH}
KINDS |= dict.fromkeys((*AXES, *AXES.values()), STEP)
STUDY_RECORD = "study.json"  # in the folder of a study


def read_runs(given: Sequence[Path]) -> list[Run]:
    """Read runs, and all runs in folders of runs. Runs without metrics are skipped."""
    runs = reading.read_runs(given)
    if not any(run.metrics for run in runs):
        raise UserError(
            f"{', '.join(map(str, given))}: no run with a metrics.jsonl; "
            "name a run's dump_dir, or a folder of runs"
        )
    warn_skipped([run.name for run in runs if not run.metrics], "no record in metrics.jsonl")
    return [run for run in runs if run.metrics]


def find_metric(y: str, runs: Sequence[Run]) -> str:
    known = sorted({key for run in runs for key in run.metrics} - {STEP, "acc_step"})
    found = full_name(y, known, "/")
    if not found:
        raise UserError(f"y={y}: no run has this metric; use {list_names(known)}")
    return only("y", y, found)


def metric_of_study(runs: Sequence[Run], x: str, *, is_curve: bool) -> str | None:
    """Return what the report of the runs' study has over such an `x`: of a plot, else of a column.

    None if it has nothing, or the runs are of no study.
    """
    folders = {run.path.resolve().parent for run in runs}
    record = folders.pop() / STUDY_RECORD
    if folders or not record.exists():
        return None
    study = json.loads(record.read_text(encoding="utf-8"))
    plots = study.get("plots", [])
    kind = KINDS.get(x, STEP if is_curve else None)
    found = [p["y"] for p in plots if KINDS.get(p.get("x", "steps")) == kind]
    found += study.get("columns", {}).values() if kind in (None, LOOPS) else []
    found += [p["y"] for p in plots] if kind is None else []
    known = {key for run in runs for key in run.metrics if not key.rpartition("/")[2].isdigit()}
    known = scores_by_loop(runs) if kind in (LOOPS, LOOP, DEPTH) else known
    return next((y for y in found if full_name(y, sorted(known), "/")), None)


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
