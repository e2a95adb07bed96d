"""Options of a model that are set and that none of its layers reads.

Nothing that was set is ignored: a run whose `gated_attn: true` finds no softmax layer would be
taken for a gated model. What differs from its default counts as set.
"""

from __future__ import annotations

import logging
from dataclasses import is_dataclass, replace
from typing import Any

from apps.LT2.mixers import MIXERS
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.args import UserError
from lingua.fields import format_value

logger = logging.getLogger(__name__)

SOFTMAX = frozenset({"full", "window", "nsa", "dsa"})
READERS: dict[str, frozenset[str]] = {
    "n_heads": frozenset(MIXERS) - {"mamba2"},  # its heads come from expand and head_dim
    "head_dim": SOFTMAX,
    "n_kv_heads": SOFTMAX,
    "rope_theta": SOFTMAX | {"retnet"},
    "gated_attn": SOFTMAX - {"nsa"},  # whose branches have gates of their own
}


def check_unused_options(args: LoopedTransformerArgs) -> None:
    """UserError for an option of `model:` that changes nothing; a log line for a whole section.

    A section (`gdn:`) may stay where a recipe is tried with another mixer. So may
    default_sliding_window, which recipes give whether or not they have a window.
    """
    used = _mixers(args)
    for name, readers in READERS.items():
        if not used & readers:
            _refuse_if_set(args, name, f"only {_names(readers)} layers read it", used)
    before_narrowing = _mixers(replace(args, sliding_window=None))
    if "full" not in before_narrowing:
        _refuse_if_set(args, "sliding_window", "it narrows full layers", used)
    for name in ("mixer", "hybrid_mixer"):
        if getattr(args, name) not in before_narrowing:
            _refuse_if_set(args, name, "attention_pattern gives it no layer", used)
    dense_warmup = "dsa" in used and args.dsa.warmup_steps > 0
    if not used & {"full", "window", "nsa"} and not dense_warmup:
        why = "only full, window and nsa layers read it, and dsa layers in their warm-up"
        _refuse_if_set(args, "attn_impl", why, used)
    for name in sorted(MIXERS.keys() - used):
        if is_dataclass(getattr(args, name, None)) and _is_set(args, name):
            logger.warning("model.%s is set, and no layer is %s", name, name)


def _refuse_if_set(args: LoopedTransformerArgs, name: str, why: str, used: set[str]) -> None:
    if _is_set(args, name):
        default = format_value(_default(args, name))
        raise UserError(
            f"model.{name}={format_value(getattr(args, name))} would change nothing: {why}, and "
            f"here all are {_names(used)}; leave it out, or say {name}={default}"
        )


def _mixers(args: LoopedTransformerArgs) -> set[str]:
    return {spec.mixer for loop in args.layout() for spec in loop}


def _is_set(args: LoopedTransformerArgs, name: str) -> bool:
    return getattr(args, name) != _default(args, name)


def _default(args: LoopedTransformerArgs, name: str) -> Any:
    return getattr(type(args)(), name)


def _names(mixers: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(mixers, key=list(MIXERS).index))
