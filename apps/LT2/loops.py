"""T of every training step: fixed, by a schedule, or sampled.

    model.loop_schedule="1@0, 2@0.2, 4@0.5"    1 loop, 2 after 20% of the steps, 4 after half
    model.loop_sample=uniform:1,2,4,8          drawn in each step; a number twice counts twice
    model.loop_sample=poisson:4                log-normal Poisson with mean 4, at most loop_count

The Poisson distribution is Huginn's (https://arxiv.org/abs/2502.05171): T - 1 is Poisson with rate
exp(tau), and tau is normal with std 0.5. Its mean is that before T is cut to loop_count. T depends
on seed and step alone, so all ranks and a resumed run draw the same.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from lingua.errors import UserError

SIGMA = 0.5  # std of tau
FORMS = "uniform:1,2,4 or poisson:MEAN"


def count(n_loops: int) -> float:
    return n_loops


@dataclass(frozen=True)
class LoopPlan:
    """T of every step: by `phases`, or drawn with `weights`."""

    phases: tuple[tuple[float, int], ...]  # (first step / steps, T), in order
    weights: tuple[float, ...] = ()  # probabilities of T = 1, 2, ...
    seed: int = 0

    @property
    def varies(self) -> bool:
        return len(self.shares()) > 1

    def draw(self, step: int, n_steps: int) -> int:
        """Return T of the step after `step` of `n_steps` steps."""
        if self.weights:
            # Python guarantees random() after a seed across versions.
            drawn = random.Random(f"loops, seed {self.seed}, step {step}").random()
            sums = itertools.accumulate(self.weights)
            likely = [T for T, weight in enumerate(self.weights, 1) if weight]
            return next((T for T, total in enumerate(sums, 1) if drawn < total), likely[-1])
        n_started = sum(first <= step for first in self.starts(n_steps))
        return self.phases[n_started - 1][1]

    def starts(self, n_steps: int) -> list[int]:
        """Return how many steps come before each phase of the schedule."""
        return [math.floor(share * n_steps + 0.5) for share, _ in self.phases]

    def shares(self) -> dict[int, float]:
        """Return the share of steps of each T that has any."""
        if self.weights:
            return {T: weight for T, weight in enumerate(self.weights, 1) if weight}
        ends = [share for share, _ in self.phases[1:]] + [1.0]
        shares: dict[int, float] = {}
        for (start, n_loops), end in zip(self.phases, ends, strict=True):
            shares[n_loops] = shares.get(n_loops, 0.0) + end - start
        return shares

    def mean(self, cost: Callable[[int], float] = count) -> float:
        """Return the mean of `cost(T)` over the steps of a run."""
        return math.fsum(share * cost(n_loops) for n_loops, share in self.shares().items())

    def total(self, cost: Callable[[int], float], first: int, n_steps: int) -> float:
        """Return the sum of `cost(T)` over the steps after the first `first`; expected if drawn."""
        if self.weights:
            return (n_steps - first) * self.mean(cost)
        starts = [max(start, first) for start in self.starts(n_steps)] + [n_steps]
        lengths = (end - start for start, end in itertools.pairwise(starts))
        return sum(n * cost(T) for n, (_, T) in zip(lengths, self.phases, strict=True))

    def __str__(self) -> str:
        parts = [f"{T} from {100 * share:g}%" for share, T in self.phases]
        if self.weights:
            parts = [f"{T} in {share:.1%}" for T, share in self.shares().items()]
        return f"{', '.join(parts)} of the steps; mean {self.mean():.3g}"


def parse_loop_plan(
    loop_count: int, schedule: str | None, sample: str | None, seed: int
) -> LoopPlan:
    """Return the plan of the options of `model:`; UserError for a mistake in one."""
    if schedule is not None and sample is not None:
        raise UserError(
            f"model.loop_schedule={schedule!r} and model.loop_sample={sample!r} both set the loops "
            "of a step; set one of them to null"
        )
    if schedule is not None:
        return LoopPlan(_parse_schedule(schedule, loop_count))
    if sample is not None:
        return LoopPlan((), _parse_sample(sample, loop_count), seed)
    return LoopPlan(((0.0, loop_count),))


def _parse_schedule(text: str, loop_count: int) -> tuple[tuple[float, int], ...]:
    phases: list[tuple[float, int]] = []
    option = f"model.loop_schedule={text!r}"
    for item in text.split(","):
        parsed = re.fullmatch(r"\s*(\d{1,9})\s*@\s*(\d+|\d*\.\d+)\s*", item)
        if parsed is None:
            raise UserError(f"{option}: {item.strip()!r} must be LOOPS@SHARE, as in 4@0.5")
        n_loops, share = int(parsed[1]), float(parsed[2])
        _check_loops(option, n_loops, loop_count)
        if share >= 1:
            raise UserError(f"{option}: {share:g} must be a share of steps, 0 to below 1")
        if not phases and share != 0:
            raise UserError(f"{option} must start with {n_loops}@0, the loops of the first step")
        if phases and share <= phases[-1][0]:
            raise UserError(
                f"{option}: shares must increase, but {share:g} follows {phases[-1][0]:g}"
            )
        phases.append((share, n_loops))
    return tuple(phases)


def _parse_sample(text: str, loop_count: int) -> tuple[float, ...]:
    option = f"model.loop_sample={text!r}"
    kind, _, rest = (part.strip() for part in text.partition(":"))
    numbers = [item.strip() for item in rest.split(",")]
    if kind == "uniform" and all(re.fullmatch(r"\d{1,9}", number) for number in numbers):
        for number in numbers:
            _check_loops(option, int(number), loop_count)
        choices = [int(number) for number in numbers]
        return tuple(choices.count(T) / len(choices) for T in range(1, loop_count + 1))
    if kind == "poisson" and re.fullmatch(r"\d+|\d*\.\d+", rest):
        if not 1 < float(rest) <= loop_count:
            raise UserError(
                f"{option}: the mean must be above 1 and at most model.loop_count={loop_count}"
            )
        return _poisson_weights(float(rest), loop_count)
    raise UserError(f"{option} must be {FORMS}")


def _check_loops(option: str, n_loops: int, loop_count: int) -> None:
    if not 1 <= n_loops <= loop_count:
        raise UserError(
            f"{option}: {n_loops} loops must be from 1 to model.loop_count={loop_count}"
        )


@cache
def _poisson_weights(mean: float, loop_count: int) -> tuple[float, ...]:
    """Integrate the probabilities of T = 1 to loop_count over tau; the last takes the rest."""
    grid = [i / 10 for i in range(-80, 81)]  # tau in standard deviations
    normal = [math.exp(-z * z / 2) for z in grid]
    rates = [(mean - 1) * math.exp(SIGMA * z - SIGMA**2 / 2) for z in grid]

    def probability(n: int) -> float:
        log = (n * math.log(rate) - rate - math.lgamma(n + 1) for rate in rates)
        return math.fsum(p * math.exp(x) for p, x in zip(normal, log, strict=True))

    weights = [probability(T - 1) / math.fsum(normal) for T in range(1, loop_count)]
    return (*weights, max(1 - math.fsum(weights), 0.0))
