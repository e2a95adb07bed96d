"""Options of a model that are set and that none of its layers reads.

Nothing that was set is ignored: a run whose `gated_attn: true` finds no softmax layer would be
taken for a gated model. What differs from its default counts as set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any

from apps.LT2.mixers import MIXERS
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.config.help import format_value
from lingua.errors import UserError


def check_unused_options(args: LoopedTransformerArgs) -> None:
    """UserError for an option of `model:` that changes nothing.

    A section (`gdn:`) may stay where a recipe is tried with another mixer. So may
    default_sliding_window, which recipes give whether or not they have a window.
    """
    for complaint in unused_options(args).values():
        raise UserError(complaint)


def unused_options(args: LoopedTransformerArgs) -> dict[str, str]:
    """Name -> what is to be said of it, of each option that is set and changes nothing."""
    used = _mixers(args)
    reasons: dict[str, str] = {}
    for name in sorted(frozenset().union(*(mixer.reads for mixer in MIXERS.values()))):
        if not used & (readers := _readers(name)):
            reasons[name] = f"only {_names(readers)} layers read it"
    if all(_own_heads(args, name) for name in used):
        reasons.setdefault("n_heads", "these layers have a number of their own")
    before_narrowing = _mixers(replace(args, sliding_window=None))
    if "full" not in before_narrowing:
        reasons["sliding_window"] = "it narrows full layers"
    for name in ("mixer", "hybrid_mixer"):
        if getattr(args, name) not in before_narrowing:
            reasons[name] = "attention_pattern gives it no layer"
    if used & _readers("attn_impl") == {"dsa"} and args.dsa.warmup_steps == 0:
        reasons["attn_impl"] = "dsa layers read it only in their warm-up, model.dsa.warmup_steps"
    return {
        name: f"model.{name}={format_value(getattr(args, name))} would change nothing: {why}, and "
        f"here all are {_names(used)}; leave it out, or say "
        f"{name}={format_value(_default(args, name))}"
        for name, why in reasons.items()
        if _is_set(args, name)
    }


def unused_sections(args: LoopedTransformerArgs) -> list[str]:
    """A line for each section that is set and that no layer reads."""
    return [
        f"model.{name} is set, and no layer is {name}"
        for name in sorted(MIXERS.keys() - _mixers(args))
        if is_dataclass(getattr(args, name, None)) and _is_set(args, name)
    ]


def warnings_of_options(args: LoopedTransformerArgs) -> Iterator[str]:
    """What may be meant so and may be an oversight, a line each; model.max_seqlen is known."""
    yield from unused_sections(args)
    used = _mixers(args)
    windows = {spec.window for loop in args.layout() for spec in loop if spec.window is not None}
    for window in sorted(w for w in windows if w >= args.max_seqlen):
        yield (
            f"a window of {window} keys hides nothing in sequences of {args.max_seqlen} tokens: "
            "its layers are full attention; make model.default_sliding_window, or the width in "
            "model.attention_pattern, smaller"
        )
    if "dsa" in used and args.dsa.top_k >= args.max_seqlen:
        yield (
            f"model.dsa.top_k={args.dsa.top_k} leaves nothing to choose in sequences of "
            f"{args.max_seqlen} tokens: dsa layers are full attention; make it smaller"
        )


def _readers(option: str) -> set[str]:
    return {name for name, mixer in MIXERS.items() if option in mixer.reads}


def _own_heads(args: LoopedTransformerArgs, mixer: str) -> int | None:
    """model.<mixer>.n_heads, where there is one: it wins over model.n_heads."""
    return getattr(getattr(args, mixer, None), "n_heads", None)


def _mixers(args: LoopedTransformerArgs) -> set[str]:
    return {spec.mixer for loop in args.layout() for spec in loop}


def _is_set(args: LoopedTransformerArgs, name: str) -> bool:
    return getattr(args, name) != _default(args, name)


def _default(args: LoopedTransformerArgs, name: str) -> Any:
    return getattr(type(args)(), name)


def _names(mixers: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(mixers, key=list(MIXERS).index))
