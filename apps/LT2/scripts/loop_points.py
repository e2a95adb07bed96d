"""Read scores of a run by loops: at several numbers of them, or after each loop or layer.

The first come from `eval loop_counts=` and training, the second from `probe_freq`.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Mapping, Sequence

from lingua.config.help import format_value
from lingua.errors import UserError
from lingua.runs import Run, full_name, list_names, only

OPTION = "model.loop_count"
LOOPS, FLOPS = "loops", "loop_flops"  # x=
LOOP, DEPTH = "loop", "depth"  # x= of metrics y/0, y/1, ... by loop, or by layer over all loops
OWN = "the run's own options"
ON_A_LINE = {"loop_count", "exit"}  # the one is x, the other has no effect

Points = dict[int, tuple[float, float]]  # number of loops -> (x, score)

logger = logging.getLogger(__name__)


def scores_by_loop(runs: Sequence[Run]) -> set[str]:
    """Return the metrics and scores that runs have by loop or layer."""
    split = [key.rpartition("/") for run in runs for key in run.metrics]
    of_metrics = {name for name, _, loops in split if loops.isdigit()}
    return of_metrics | {key for run in runs for e in run.evaluations for key in e.scores}


def find_score(y: str, runs: Sequence[Run]) -> str:
    """Resolve a metric or score, which may be shortened to its end."""
    known = scores_by_loop(runs)
    if not (found := full_name(y, sorted(known), "/")):
        other = f"use {list_names(sorted(known))}" if known else "train with probe_freq"
        todo = f"run {eval_command(runs[0])}, or {other}"
        raise UserError(f"y={y}: no run has this score at several T or layers; {todo}")
    return only("y", y, found)


def eval_command(run: Run) -> str:
    """Return the command that evaluates a run at several T."""
    return shlex.join(["lt2", "eval", str(run.path), "loop_counts=[1,2,4]"])


def no_line(runs: Sequence[Run], y: str, x: str) -> UserError:
    """Return the error that no run has `y` at several `x`, with what to do."""
    if x in (LOOP, DEPTH):
        return UserError(f"x={x}: no run has {y} of probe_freq; x=loops draws evaluations")
    names, is_one = list_names([run.name for run in runs], 3), len(runs) == 1
    if any(loop_points(run, y, x) for run in runs):
        why = f"{names} {'was' if is_one else 'were'} evaluated at one T only"
    else:
        kind = "with FLOPs" if x == FLOPS else "without an exit"
        why = f"no evaluation of {names} has {y} {kind}"
    todo = f"run {eval_command(runs[0])}{'' if is_one else ' for each'}"
    if len({trained_loops(run) for run in runs}) > 1:
        todo += ", or use x=loop_count"
    return UserError(f"x={x}: {why}; {todo}")


def loop_points(run: Run, y: str, x: str) -> dict[str, Points]:
    """Return the points of evaluations by their options that are not the run's own.

    The key is "" with the run's own options, else e.g. "validation.max_steps=50". loop_count and
    exit aren't in it, and evaluations whose tokens leave early don't count. The points are of the
    step with the most points, else the newest. With x=loop or depth, loops and layers are counted
    from 1.
    """
    found: dict[str, dict[int, Points]] = {"": {}}  # by options, then step
    first = 1 if x in (LOOP, DEPTH) else 0  # the metrics count from 0
    if x != FLOPS:
        for key, values in run.metrics.items():
            name, _, loops = key.rpartition("/")
            for step, value in values.items() if name == y and loops.isdigit() else ():
                if value is not None:
                    at = first + int(loops)
                    found[""].setdefault(step, {})[at] = (at, value)
    for evaluation in run.evaluations if x in (LOOPS, FLOPS) else ():
        loops, flops = evaluation.made_with.get("loop_count"), evaluation.flops_per_token
        at = loops if x == LOOPS else flops
        runs_all = evaluation.made_with.get("exit", "none") == "none"  # as in training
        if y in evaluation.scores and runs_all and loops and at:
            others = sorted((o, v) for o, v in evaluation.differs.items() if o not in ON_A_LINE)
            options = ", ".join(f"{o}={format_value(v)}" for o, v in others)
            points = found.setdefault(options, {}).setdefault(evaluation.step or 0, {})
            points[loops] = (at, evaluation.scores[y])
    return {options: _best_step(by_step) for options, by_step in found.items() if by_step}


def _best_step(by_step: Mapping[int, Points]) -> Points:
    step = max(by_step, key=lambda s: (len(by_step[s]), s))
    return dict(sorted(by_step[step].items()))


def options_to_draw(of_runs: Sequence[Mapping[str, Points]]) -> str:
    """Return the key of `loop_points` with several T in the most runs, preferably ""."""

    def order(options: str) -> tuple[int, bool, int]:
        counts = [len(points.get(options, ())) for points in of_runs]
        return sum(n > 1 for n in counts), not options, sum(counts)

    return max(["", *(options for points in of_runs for options in points)], key=order)


def warn_of_options(lines: Iterable[tuple[str, Mapping[str, Mapping[str, Points]]]]) -> None:
    """Log which evaluations each run of a plot has, unless it has only its own options.

    `lines` are the options that a line draws, and the points of its runs, by name.
    """
    found: dict[str, list[str]] = {}  # message -> names of runs
    for drawn, of_runs in lines:
        for name, of_run in of_runs.items():
            text = "drawn are evaluations" if drawn in of_run else "not drawn: no evaluation"
            text += f" with {drawn or OWN}"
            if left_out := [options or OWN for options in of_run if options != drawn]:
                text += f"; left out: {' and '.join(left_out)}"
            if drawn or left_out:
                found.setdefault(text, []).append(name)
    for text, names in found.items():
        logger.warning("plot: %s: %s", list_names(names, 3), text)


def trained_loops(run: Run) -> int:
    """Return model.loop_count, or 0 if T was sampled."""
    options = run.options.current
    return 0 if options.get("model.loop_sample") else int(options.get(OPTION, 1))
