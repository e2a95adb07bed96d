"""Leave the loops early: the rules, and loops that some tokens have left.

    exit=none        every token runs all loops
    exit=2           every token runs the first 2 loops, as with loop_count=2
    exit=gate:0.8    a token leaves after loop t if p_1 + ... + p_t of its exit gate is at least 0.8
                     (loop_loss.py; Ouro, https://arxiv.org/abs/2510.25741)
    exit=kl:0.005    a token leaves after loop t > 1 if KL(prediction after t - 1 || after t) is
                     below 0.005 nats (Huginn, https://arxiv.org/abs/2502.05171)

A token that has left keeps its state, which gives its prediction. In the loops that it skips, the
mixer of each layer gets the input that this layer had in the token's last loop. Later tokens see it
so:

    full, window, nsa, dsa    its keys and values (and index keys) come from its last loop, as in
                              Ouro and Huginn; block means of nsa include them
    linear mixers             the state of the skipped loop takes the token in, with the keys,
                              values, decays and convolution inputs of its last loop

A state that ignored the token would forget it: a late loop would only know the few tokens that got
there. The update costs no projections and no feed-forward network. The rule needs nothing but the
inputs of the mixers, so it is exact for all of them: decoding with caches equals `exit_states`.

Shapes: B sequences, T tokens, D model dim, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apps.LT2.kernel.exit_gate import exit_by_gate
from apps.LT2.kernel.exit_kl import kl_of_logits
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.errors import UserError

LOGITS_AT_ONCE = 2**26  # 256 MiB in fp32


class ExitRule(NamedTuple):
    kind: str  # "loops", "gate" or "kl"
    limit: float  # number of loops, or threshold

    @property
    def is_fixed(self) -> bool:
        return self.kind == "loops"

    def may_fire(self, loop_count: int) -> bool:
        """Return whether a token may leave before the last of `loop_count` loops."""
        return self.is_fixed or loop_count > {"gate": 1, "kl": 2}[self.kind]


def parse_exit(text: str) -> ExitRule | None:
    """Return the rule, None for "none"; UserError for a wrong one."""
    if text == "none":
        return None
    if text.removeprefix("-").isdecimal():
        return ExitRule("loops", int(text))
    kind, _, threshold = text.partition(":")
    try:
        rule = ExitRule(kind, float(threshold))
    except ValueError:
        rule = ExitRule("", 0)
    if rule.kind not in ("gate", "kl"):
        raise UserError(
            f"exit={text} must be none, a number of loops, gate:THRESHOLD as in gate:0.8, or "
            "kl:THRESHOLD as in kl:0.005"
        )
    if not 0 < rule.limit < 1:
        raise UserError(f"exit={text}: the threshold must be above 0 and below 1")
    return rule


def check_exit(text: str, args: LoopedTransformerArgs, loop_count: int) -> ExitRule | None:
    """Return the rule; UserError if a model that runs `loop_count` loops can't follow it."""
    rule = parse_exit(text)
    if rule is None:
        return None
    if rule.is_fixed and not 1 <= rule.limit <= loop_count:
        raise UserError(f"exit={text} must be from 1 to loop_count={loop_count}")
    if rule.kind == "gate" and args.loop_loss != "gate":
        raise UserError(
            f"exit={text} needs an exit gate, which model.loop_loss={args.loop_loss} doesn't "
            "train; use kl:0.005, or a model trained with model.loop_loss=gate"
        )
    return rule


@contextmanager
def exit_loops(model: LoopedTransformer, rule: ExitRule | None) -> Iterator[None]:
    """Run the loops of a fixed rule within the context, and restore the model's at the end."""
    if rule is None or not rule.is_fixed:
        yield
        return
    layouts = model.layout, model.inference_layout
    model.set_loops(int(rule.limit))
    try:
        yield
    finally:
        model.layout, model.inference_layout = layouts


@dataclass
class TokenLoops:
    """Where tokens are in the loops."""

    h_BTD: Tensor  # the residual stream; of a token that has left, after its last loop
    left_BT: Tensor  # bool
    inputs: Sequence[Tensor | None]  # (B, T, D) of each layer in its last loop; None before loop 0
    # For the next decision. gate: log p(no exit yet), (B, T). kl: the logits, if they are few.
    seen: Tensor | None = None


def enter_loops(model: LoopedTransformer, tokens_BT: Tensor, left_BT: Tensor) -> TokenLoops:
    """Embed tokens. Those in `left_BT` count as left, and give arbitrary states."""
    return TokenLoops(model.tok_embeddings(tokens_BT), left_BT, [None] * len(model.layers))


def run_loop(
    model: LoopedTransformer,
    rule: ExitRule,
    at: TokenLoops,
    t: int,
    run_layer: Callable[..., Tensor],
    *grids: Sequence[Any],
    all_run: bool = False,
) -> TokenLoops:
    """Run loop t, counted from 0, and decide which tokens leave after it. Doesn't sync.

    run_layer(block, h, spec, *entries) returns h, with the layer's entry in each of `grids`.
    all_run: no token has left; saves the selection of states.
    """
    all_run, inputs = all_run or t == 0, []
    left_BT1 = at.left_BT[..., None]

    def run(block: Any, h: Tensor, spec: Any, last: Any, *entries: Any) -> tuple[Tensor, None]:
        h = h if all_run else torch.where(left_BT1, last, h)
        inputs.append(h)
        return run_layer(block, h, spec, *entries), None

    h, _ = model.run_loop(at.h_BTD, t, run, (model.inference_layout[t], at.inputs, *grids))
    is_last = t + 1 == len(model.inference_layout)
    if rule.kind == "gate" and not is_last:
        h, left_BT, stay_BT = _leave_by_gate(model, rule.limit, at, h, hold=not all_run)
        return TokenLoops(h, left_BT, inputs, stay_BT)
    if not all_run:
        h = torch.where(left_BT1, at.h_BTD, h)
    if is_last or rule.is_fixed:
        return TokenLoops(h, at.left_BT, inputs)
    leaves_BT, logits = _leave_by_kl(model, rule, at, h, t)
    return TokenLoops(h, at.left_BT | leaves_BT, inputs, logits)


def _leave_by_gate(
    model: LoopedTransformer, threshold: float, at: TokenLoops, h: Tensor, hold: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h of all tokens, which ones have left after this loop, and log p(no exit yet)."""
    gate, norm = model.exit_gate, model.norm
    assert gate is not None
    h_ND, left_N, stay_N = exit_by_gate(
        h.flatten(0, 1),
        at.left_BT.flatten(),
        None if at.seen is None else at.seen.flatten(),
        norm.weight,
        norm.eps,
        gate.weight,
        gate.bias,
        threshold,
        held_ND=at.h_BTD.flatten(0, 1) if hold else None,
    )
    return h_ND.view_as(h), left_N.view_as(at.left_BT), stay_N.view(at.left_BT.shape)


def _leave_by_kl(
    model: LoopedTransformer, rule: ExitRule, at: TokenLoops, h: Tensor, t: int
) -> tuple[Tensor, Tensor | None]:
    """Return which tokens leave after loop t with state h, (B, T), and the logits if few."""
    logits = None
    if h.shape[0] * h.shape[1] * model.args.vocab_size <= LOGITS_AT_ONCE:
        logits = model.logits_of(h)
    if t == 0:
        return torch.zeros_like(at.left_BT), logits
    if logits is not None and at.seen is not None:
        kl = kl_of_logits(at.seen, logits)
    else:
        n = max(1, LOGITS_AT_ONCE // model.args.vocab_size)
        pairs = zip(*(x.flatten(0, 1).split(n) for x in (at.h_BTD, h)), strict=True)
        kl = torch.cat([kl_of_logits(model.logits_of(a), model.logits_of(b)) for a, b in pairs])
    return kl.view_as(at.left_BT) < rule.limit, logits


@torch.no_grad()
def exit_states(
    model: LoopedTransformer,
    tokens_BT: Tensor,
    rule: ExitRule,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run whole sequences with exits; return (B, T, D) and (B, T) int64.

    The first is the residual stream after each token's last loop, the second its number of loops.
    Every token may leave, also in a prompt.
    """

    def run_layer(block: Any, h: Tensor, spec: Any) -> Tensor:
        return block(h, spec, cu_seqlens)[0]

    with exit_loops(model, rule):
        at = enter_loops(model, tokens_BT, torch.zeros_like(tokens_BT, dtype=torch.bool))
        n_BT = torch.zeros_like(tokens_BT)
        for t in range(len(model.inference_layout)):
            n_BT += ~at.left_BT
            at = run_loop(model, rule, at, t, run_layer)
            if at.left_BT.all():
                break
    return at.h_BTD, n_BT
