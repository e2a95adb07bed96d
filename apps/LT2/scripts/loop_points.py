"""Read scores of a run by loops: at several numbers of them, or after each loop or layer.

The first come from `eval loop_counts=` and training, the second from `probe_freq`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lingua.errors import UserError
from lingua.runs import Run, full_name, list_names, only

OPTION = "model.loop_count"
LOOPS, FLOPS = "loops", "loop_flops"  # x=
LOOP, DEPTH = "loop", "depth"  # x= of metrics y/0, y/1, ... by loop, or by layer over all loops


def find_score(y: str, runs: Sequence[Run]) -> str:
    """Resolve a metric or score, which may be shortened to its end."""
    known = {key for run in runs for e in run.evaluations for key in e.scores}
    split = [key.rpartition("/") for run in runs for key in run.metrics]
    known |= {name for name, _, loops in split if loops.isdigit()}
    if not (found := full_name(y, sorted(known), "/")):
        shown = list_names(sorted(known)) if known else "eval loop_counts=[1,2,4] or probe_freq"
        raise UserError(f"y={y}: no run has this score by loops or layers; use {shown}")
    return only("y", y, found)


def loop_points(run: Run, y: str, x: str) -> dict[int, tuple[float, float]]:
    """Return number of loops -> (x, score), of the step with the most points, else the newest.

    With x=loop or depth, loops and layers are counted from 1.

    Evaluations with other options than the run's, loop_count aside, don't count, nor those whose
    tokens leave early.
    """
    by_step: dict[int, dict[int, tuple[float, float]]] = {}
    first = 1 if x in (LOOP, DEPTH) else 0  # the metrics count from 0
    if x != FLOPS:
        for key, values in run.metrics.items():
            name, _, loops = key.rpartition("/")
            for step, value in values.items() if name == y and loops.isdigit() else ():
                if value is not None:
                    at = first + int(loops)
                    by_step.setdefault(step, {})[at] = (at, value)
    for evaluation in run.evaluations if x in (LOOPS, FLOPS) else ():
        loops, flops = evaluation.made_with.get("loop_count"), evaluation.flops_per_token
        at = loops if x == LOOPS else flops
        is_own = evaluation.differs.keys() <= {"loop_count", "exit"}
        runs_all = evaluation.made_with.get("exit", "none") == "none"  # as in training
        if y in evaluation.scores and is_own and runs_all and loops and at:
            by_step.setdefault(evaluation.step or 0, {})[loops] = (at, evaluation.scores[y])
    step = max(by_step, key=lambda s: (len(by_step[s]), s), default=None)
    return {} if step is None else dict(sorted(by_step[step].items()))


def trained_loops(run: Run) -> int:
    """Return model.loop_count, or 0 if T was sampled."""
    options = run.options.current
    return 0 if options.get("model.loop_sample") else int(options.get(OPTION, 1))
