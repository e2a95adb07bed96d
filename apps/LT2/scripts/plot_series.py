"""Turn runs into the lines of a plot: curves, final values against an option, scores by loops."""

from __future__ import annotations

import logging
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from apps.LT2.scripts.figure import plain_number, smooth
from apps.LT2.scripts.loop_points import (
    DEPTH,
    FLOPS,
    LOOP,
    LOOPS,
    loop_points,
    options_to_draw,
    trained_loops,
    warn_of_options,
)
from lingua.runs import STEP, Run, natural_key, option_text, warn_skipped

logger = logging.getLogger(__name__)

TITLES = {
    STEP: "optimizer step",
    LOOPS: "loops",
    FLOPS: "forward FLOPs per token",
    LOOP: "loop",
    DEPTH: "layer, over all loops",
    "optim/total_tokens": "training tokens",
    "optim/total_flops": "training FLOPs",
    "time/elapsed": "seconds",
    "loss/out": "training loss (nats per token)",
    "loss/val": "validation loss (nats per token)",
    "loss/val_bpb": "validation loss (bits per byte)",
    "acc/out": "training accuracy",
    "acc/val": "validation accuracy",
    "speed/tokens_per_s": "training tokens/s",
    "loops/residual_rms": "RMS of the residual stream after the loop",
    "depth/first_token_mass": "attention on the first token",
}


@dataclass
class Series:
    """A line before it gets its colour: one run, or several that differ in `mean`."""

    options: dict[str, str]  # options that differ between runs, except x= and mean=
    name: str  # of its run; "" of several
    x: list[Any]
    of_runs: list[dict[str, float]]  # at each x, the values that are averaged, by name of the run
    window: int = 1  # of PlotArgs.smooth
    loops: list[int] | None = None  # of each point, for x=loops and x=loop_flops
    trained: int | None = None  # loops of training
    evaluated_with: str = ""  # options of the evaluations; "": the run's own

    @cached_property
    def y(self) -> list[float]:
        return [statistics.fmean(values.values()) for values in self.of_runs]

    @cached_property
    def std(self) -> list[float]:
        values = [[*at.values()] for at in self.of_runs]
        return [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]

    @property
    def n(self) -> list[int]:
        return [len(values) for values in self.of_runs]

    @property
    def is_mean(self) -> bool:
        return any(n > 1 for n in self.n)

    def drawn(self, values: list[float]) -> list[float]:
        return smooth(values, self.window) if self.window > 1 else values

    def curves(self) -> list[tuple[list[Any], list[float]]]:
        """Return the curve of each run of a mean, none without means."""
        points: dict[str, tuple[list[Any], list[float]]] = {}
        for x, at in zip(self.x, self.of_runs, strict=True) if self.is_mean else ():
            for name, y in at.items():
                xs, ys = points.setdefault(name, ([], []))
                xs.append(x)
                ys.append(y)
        return [(xs, self.drawn(ys)) for xs, ys in points.values()]


def curve(run: Run, x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the finite values of `y`, ordered by `x`.

    A record without `x`, such as a validation, gets it from the records around it, linearly in the
    step.
    """
    points = sorted((step, value) for step, value in run.metrics[y].items() if value is not None)
    steps = [step for step, _ in points]
    if x == STEP:
        return [float(step) for step in steps], [value for _, value in points]
    known = {0: 0.0} | {s: v for s, v in run.metrics[x].items() if v is not None}
    at, values = zip(*sorted(known.items()), strict=True)
    return [interpolate(step, at, values) for step in steps], [value for _, value in points]


def interpolate(x: float, at: Sequence[float], values: Sequence[float]) -> float:
    """Interpolate linearly between sorted points, and extrapolate from the nearest two."""
    i = min(max(bisect_left(at, x), 1), len(at) - 1)
    if at[i] == at[i - 1]:
        return values[i]
    share = (x - at[i - 1]) / (at[i] - at[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def on_one_grid(
    curves: Mapping[str, tuple[list[float], list[float]]],
) -> tuple[list[float], list[dict[str, float]]]:
    """Return the x of the first curve, as far as all of them reach, and the values there."""
    if len(curves) == 1:
        ((name, (xs, ys)),) = curves.items()
        return xs, [{name: y} for y in ys]
    low, high = max(x[0] for x, _ in curves.values()), min(x[-1] for x, _ in curves.values())
    grid = [x for x in next(iter(curves.values()))[0] if low <= x <= high]
    if high not in grid and low <= high:
        grid.append(high)
    return grid, [{name: interpolate(at, x, y) for name, (x, y) in curves.items()} for at in grid]


def curves_over(x: str, y: str, groups: Any, window: int) -> list[Series]:
    found = []
    for options, members in groups:
        points = {run.name: curve(run, x, y) for run in members}
        ends = [xs[-1] for xs, _ in points.values()]
        first, last = min(ends), max(ends)
        if first < 0.99 * last:
            logger.warning(
                "a mean ends at %s %s with its shortest run; the longest ends at %s",
                *(TITLES.get(x, x), plain_number(first), plain_number(last)),
            )
        xs, of_runs = on_one_grid(points)
        if xs:
            found.append(Series(options, name_of(list(points)), xs, of_runs, window))
    return found


def curves_over_loops(x: str, y: str, groups: Any) -> list[Series]:
    """Return one series a group: scores of checkpoints at several numbers of loops.

    All points of a series are of evaluations with the same options, and so are all series if some
    options have several T in every run.
    """
    found, choices = [], []
    by_group = [{run.name: loop_points(run, y, x) for run in members} for _, members in groups]
    everything = [of_run for of_runs in by_group for of_run in of_runs.values()]
    shared = options_to_draw(everything)
    is_shared = all(len(of_run.get(shared, ())) > 1 for of_run in everything)
    for (options, members), of_runs in zip(groups, by_group, strict=True):
        drawn = shared if is_shared else options_to_draw([*of_runs.values()])
        points = {name: of_run[drawn] for name, of_run in of_runs.items() if drawn in of_run}
        choices.append((drawn, of_runs))
        loops = sorted({n for of_run in points.values() for n in of_run})
        at = [{name: p[n] for name, p in points.items() if n in p} for n in loops]
        values = [{name: value for name, (_, value) in of_loops.items()} for of_loops in at]
        xs = [statistics.fmean(x for x, _ in of_loops.values()) for of_loops in at]
        trained = {trained_loops(run) for run in members}
        series = Series(options, name_of(list(points)), xs, values)
        series.evaluated_with = drawn
        if x in (LOOPS, FLOPS):
            series.loops, series.trained = loops, trained.pop() if len(trained) == 1 else None
        found += [series] if loops else []
    warn_of_options(choices)
    return found


def name_of(runs: Sequence[str]) -> str:
    return runs[0] if len(runs) == 1 else ""


def finals_against(option: str, y: str, groups: Any) -> list[Series]:
    """Return one series a group: the last values of its runs against an option."""
    found, diverged, mixed = [], [], set()
    for options, members in groups:
        steps: dict[str, set[int]] = {}
        at: dict[str, dict[str, float]] = {}  # value of the option -> final values of its runs
        for run in members:
            step = max(run.metrics[y])
            value = run.metrics[y][step]
            if value is None:
                diverged.append(run.name)
            else:
                text = option_text(run, option)
                steps.setdefault(text, set()).add(step)
                at.setdefault(text, {})[run.name] = value
        mixed |= {step for of_point in steps.values() if len(of_point) > 1 for step in of_point}
        if at:
            texts = sorted(at, key=natural_key)
            name = name_of(["; ".join(at[text]) for text in texts])
            found.append(Series(options, name, texts, [at[text] for text in texts]))
    warn_skipped(diverged, f"the last {y} is NaN or infinite")
    if mixed:
        logger.warning(
            "means are of different steps, %d to %d: some runs are shorter or still running",
            *(min(mixed), max(mixed)),
        )
    return found
