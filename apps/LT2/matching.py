"""Change one size of a model until it has the parameters or FLOPs of another."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from apps.LT2.flops import count_parameters, train_flops_per_token
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs, build_on_meta
from lingua.errors import UserError

TOLERANCE = 0.03  # models that differ by less are comparable
DIM_STEP = 16  # candidates for dim are multiples of it
FFN_STEP = 8  # and of the FFN dim, of this
MAX_GAP = 64  # candidates between two possible sizes

Distance = Callable[[int], float | None]


def parameters(model: LoopedTransformer, seqlen: int) -> int:
    """Return the parameters without embeddings, which depend on the vocabulary and dim alone."""
    count = count_parameters(model)
    return count.total - count.embedding


# What `match` makes equal.
QUANTITIES: dict[str, Callable[[LoopedTransformer, int], int]] = {
    "parameters": parameters,
    "flops": train_flops_per_token,
}


def by_n_layers(args: LoopedTransformerArgs, n: int) -> dict[str, Any]:
    return {"n_layers": n}


def by_dim(args: LoopedTransformerArgs, n: int) -> dict[str, Any]:
    return {"dim": DIM_STEP * n}


def by_ffn(args: LoopedTransformerArgs, n: int) -> dict[str, Any]:
    """Set the FFN dim to n * FFN_STEP."""
    plain = int(8 * args.dim / 3)
    multiplier = math.ceil(1000 * (n * FFN_STEP - FFN_STEP / 2) / plain) / 1000
    return {"ffn_dim_multiplier": multiplier, "multiple_of": FFN_STEP}


BY = {"n_layers": by_n_layers, "dim": by_dim, "ffn": by_ffn}


def match_model(
    args: LoopedTransformerArgs,
    target: int,
    *,
    quantity: str | Callable[[LoopedTransformer, int], int],
    by: str,
    seqlen: int,
) -> dict[str, Any]:
    """Return the options of `model:` that bring `quantity` closest to `target`.

    Return none if no value comes closer than the model as given. UserError if the closest is not
    within TOLERANCE.
    """
    measure = QUANTITIES[quantity] if isinstance(quantity, str) else quantity
    given = measure(build_on_meta(args), seqlen) / target - 1

    @cache
    def distance(n: int) -> float | None:
        """Return the relative difference at n, or None if the model cannot have this size."""
        try:
            model = build_on_meta(replace(args, **BY[by](args, n)))
        except UserError:
            return None
        return measure(model, seqlen) / target - 1

    above = _first_above(distance)
    candidates = [n for n in (_possible(distance, above), _possible(distance, above - 1, -1)) if n]
    if not candidates:
        others = " or ".join(name for name in BY if name != by)
        raise UserError(f"match={quantity} by={by}: no size fits; try by={others}")
    best = min(candidates, key=lambda n: abs(distance(n) or 0))
    options, difference = BY[by](args, best), distance(best) or 0
    if abs(given) <= abs(difference):
        options, difference = {}, given
    if abs(difference) > TOLERANCE:
        closest = " ".join(f"model.{name}={value}" for name, value in options.items())
        raise UserError(
            f"match={quantity} by={by}: the closest, {closest or 'as given'}, differs by "
            f"{difference:+.1%}, more than {TOLERANCE:.0%}; use another by=, or a larger model"
        )
    return options


def _first_above(distance: Distance) -> int:
    """Return the smallest n from which on the quantity is at least the target."""

    def is_above(n: int) -> bool:
        possible = _possible(distance, n)
        return possible is None or (distance(possible) or 0) >= 0

    high = 1
    while not is_above(high):
        high *= 2
    return bisect_left(range(high), True, lo=1, key=is_above)


def _possible(distance: Distance, n: int, step: int = 1) -> int | None:
    """Return the first size from n on that the model can have, within MAX_GAP."""
    sizes = range(n, max(0, n + step * MAX_GAP), step)
    return next((size for size in sizes if distance(size) is not None), None)
