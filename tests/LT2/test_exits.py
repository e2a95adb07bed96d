"""Tokens leave the loops early: caches, rows of a batch and rules against a plain recomputation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apps.LT2.exits
from apps.LT2.exits import ExitRule, check_exit, exit_loops, exit_states, parse_exit
from apps.LT2.inference.early_exit import ExitDecoder
from apps.LT2.inference.load import fuse_projections
from apps.LT2.mixers.deltanet import DeltaNetArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.transformer import LoopedTransformer
from lingua.errors import UserError
from tests.LT2.looped_models import ONE_SEGMENT, PER_LOOP, assert_same_fp32, make, prompt

OTHER_MIXERS = {
    name: {"mixer": name} for name in ("kda", "mamba2", "hgrn2", "deltanet", "retnet", "gla")
} | {
    "gdn_no_conv": {"mixer": "gdn", "gdn": GatedDeltaNetArgs(conv_size=0)},
    "deltanet_no_conv": {"mixer": "deltanet", "deltanet": DeltaNetArgs(conv_size=0)},
    "nsa": {
        "mixer": "nsa",
        "n_heads": 16,
        "head_dim": 4,
        "nsa": NSAArgs(block_size=4, n_blocks=3, window_size=3),
    },
}
MODELS = {
    **{name: {**changes, "loop_count": 3} for name, changes in ONE_SEGMENT.items()},
    **{name: {**changes, "loop_count": 3} for name, changes in OTHER_MIXERS.items()},
    **PER_LOOP,
    "linear_families_swap": {"attention_pattern": "gdn,kda->kda,gdn->gdn,gdn", "loop_count": 3},
    "nsa_then_gdn": {
        **OTHER_MIXERS["nsa"],
        "gdn": GatedDeltaNetArgs(head_dim=4),
        "attention_pattern": "nsa->gdn->nsa",
        "loop_count": 3,
    },
}
GATE, KL = ExitRule("gate", 0.6), ExitRule("kl", 0.2)


def make_gated(**changes) -> LoopedTransformer:
    """Make a model whose exits differ from token to token."""
    model = make(loop_loss="gate", **changes)
    assert model.exit_gate is not None
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        model.exit_gate.weight.copy_(torch.randn(model.args.dim, generator=generator))
    return model.requires_grad_(False)


def leaves(model: LoopedTransformer, rule: ExitRule, states: list[Tensor], s: int) -> bool:
    """Return whether token s leaves after the last of `states`, each (T, D)."""
    if rule.kind == "gate":
        assert model.exit_gate is not None
        stays = 1.0
        for h in states:
            logit = model.norm(h[s]) @ model.exit_gate.weight + model.exit_gate.bias
            stays *= 1 - torch.sigmoid(logit).item()
        return 1 - stays >= rule.limit
    if len(states) < 2:
        return False
    p, q = (model.logits_of(h[s]).double().softmax(-1) for h in states[-2:])
    return (p * (p / q).log()).sum().item() < rule.limit


def recompute(
    model: LoopedTransformer, tokens_T: Tensor, rule: ExitRule, n_prompt: int = 0
) -> tuple[Tensor, list[int]]:
    """Return logits (T, V) and loops of a sequence; the tokens of the prompt never leave."""
    T, n_loops = len(tokens_T), len(model.inference_layout)
    h, left, states = model.tok_embeddings(tokens_T), {}, []
    inputs: dict[int, Tensor] = {}  # layer -> input of each token in its last loop
    for t, loop in enumerate(model.inference_layout):
        u = h
        for i, (block, spec) in enumerate(zip(model.layers, loop, strict=True)):
            rows = [inputs[i][s] if s in left else h[s] for s in range(T)]
            inputs[i] = torch.stack(rows)
            h = block(inputs[i][None], spec)[0][0]
        if model.rho is not None:
            h = h + model.rho[t] * u
        h = torch.stack([states[-1][s] if s in left else h[s] for s in range(T)])
        states.append(h)
        for s in range(n_prompt, T):
            if s not in left and t + 1 < n_loops and leaves(model, rule, states, s):
                left[s] = t + 1
    return model.logits_of(h), [left.get(s, n_loops) for s in range(T)]


def decode(
    model: LoopedTransformer, decoder: ExitDecoder, tokens: Tensor
) -> tuple[Tensor, list[int]]:
    """Return the logits (B, T, V), and the number of loops that each step ran."""
    logits, ran = [], []
    for token in tokens.split(1, 1):
        before = int(decoder.tally.n_loops)
        logits.append(decoder.step(token))
        ran.append(int(decoder.tally.n_loops) - before)
    return torch.cat(logits, 1), ran


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_a_recomputation_by_the_rule(name):
    model = make_gated(**MODELS[name])
    tokens = prompt(1, 14)
    want, loops = recompute(model, tokens[0], GATE)
    assert len(set(loops)) > 1, "no token leaves at another loop than the others"
    got, ran = decode(model, ExitDecoder(model, model.init_cache(1, 14), GATE), tokens)
    assert ran == loops
    assert_same_fp32(got[0], want)
    h, n = exit_states(model, tokens, GATE)
    assert n[0].tolist() == loops
    assert_same_fp32(model.logits_of(h[0]), want)


@pytest.mark.parametrize("rule", [GATE, KL], ids=["gate", "kl"])
@pytest.mark.parametrize("name", ["full", "gdn_full_4to1", "full_gqa_gated"])
def test_rows_after_prompts_decode_as_alone(name, rule):
    """All loops run in the prompts. The weights are fused, as on a GPU."""
    model = make_gated(**MODELS[name])
    tokens, n_prompt = prompt(3, 16), 6
    found = [recompute(model, row, rule, n_prompt) for row in tokens]
    loops = [n[n_prompt:] for _, n in found]
    assert len({n for row in loops for n in row}) > 1
    fuse_projections(model)
    cache = model.init_cache(3, 16)
    model.prefill(tokens[:, :n_prompt], cache)
    decoder = ExitDecoder(model, cache, rule)
    got, ran = decode(model, decoder, tokens[:, n_prompt:])
    assert_same_fp32(got, torch.stack([logits[n_prompt:] for logits, _ in found]))
    assert ran == [sum(step) for step in zip(*loops, strict=True)]
    assert decoder.tally.n_tokens == 30


def test_skipped_loops_attend_to_the_keys_and_values_of_the_last_loop():
    """Softmax attention by hand, in which loop t reads keys and values of min(t, exit)."""
    model = make_gated(mixer="full", loop_count=3, n_layers=2)
    tokens_T, mixers = prompt(1, 12)[0], [block.attention for block in model.layers]
    _, loops = recompute(model, tokens_T, GATE)
    T, h, final = 12, model.tok_embeddings(tokens_T), {}
    pasts: list[list[tuple[Tensor, Tensor]]] = [[(torch.empty(0),) * 2] * T for _ in mixers]
    for t in range(3):
        u = h
        for block, mixer, past in zip(model.layers, mixers, pasts, strict=True):
            x = block.attention_norm(h)
            q, k, v = mixer._qkv(x[None], torch.arange(T))
            for s in range(T):
                if t < loops[s]:
                    past[s] = k[0, s], v[0, s]
            k, v = (torch.stack(x) for x in zip(*past, strict=True))
            o = F.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in (q[0], k, v)), is_causal=True
            )
            h = h + mixer.wo(o.transpose(0, 1).flatten(1))
            h = h + block.feed_forward(block.ffn_norm(h))
        h = h + model.rho[t] * u
        final |= {s: h[s] for s in range(T) if loops[s] == t + 1}
    want = model.logits_of(torch.stack([final[s] for s in range(T)]))
    got, _ = decode(model, ExitDecoder(model, model.init_cache(1, T), GATE), tokens_T[None])
    assert_same_fp32(got[0], want)


@pytest.mark.parametrize("rule", [ExitRule("gate", 1 - 1e-9), ExitRule("kl", 1e-30)], ids=str)
@pytest.mark.parametrize("name", ["full", "gdn_dsa_1to1", "families_swap"])
def test_an_exit_that_never_fires_equals_plain_steps_to_the_bit(name, rule):
    model, tokens = make_gated(**MODELS[name]), prompt(2, 12)
    model.exit_gate.bias.fill_(-30)
    model.exit_gate.weight.zero_()
    caches = [model.init_cache(2, 12) for _ in range(2)]
    for cache in caches:
        model.prefill(tokens[:, :4], cache)
    decoder = ExitDecoder(model, caches[0], rule)
    for token in tokens[:, 4:].split(1, 1):
        assert torch.equal(decoder.step(token), model.step(token, caches[1]))
    for one, other in zip(caches[0]._caches(), caches[1]._caches(), strict=True):
        assert all(map(torch.equal, one.snapshot(), other.snapshot()))
    assert decoder.tally.n_loops == decoder.tally.n_tokens * len(model.inference_layout)


def test_a_step_stops_when_all_rows_that_count_have_left(monkeypatch):
    model = make_gated(mixer="gdn", loop_count=4, hybrid_mixer="full", attention_pattern="1:1")
    ran = []
    for block in model.layers:
        step = block.step
        monkeypatch.setattr(block, "step", lambda *a, step=step: ran.append(1) or step(*a))
    rows = [object(), None]
    decoder = ExitDecoder(model, model.init_cache(2, 8), GATE, rows=rows)
    model.exit_gate.weight.zero_()
    model.exit_gate.bias.fill_(30)
    decoder.step(prompt(2, 1))
    assert len(ran) == 2 and decoder.tally.n_loops == decoder.tally.n_tokens == 1
    model.exit_gate.bias.fill_(-30)
    decoder.step(prompt(2, 1))
    assert len(ran) == 2 + 4 * 2 and decoder.tally.n_loops == 5
    rows[0] = None  # nothing counts
    decoder.step(prompt(2, 1))
    assert len(ran) == 2 + 4 * 2 + 2 and decoder.tally.n_tokens == 2
    assert decoder.cache.lengths == [3, 3]


def test_kl_of_many_tokens_is_computed_in_parts(monkeypatch):
    model, tokens = make_gated(mixer="full", loop_count=3), prompt(2, 9)
    want = exit_states(model, tokens, KL)
    monkeypatch.setattr(apps.LT2.exits, "LOGITS_AT_ONCE", 4 * model.args.vocab_size)
    for got, expected in zip(exit_states(model, tokens, KL), want, strict=True):
        assert_same_fp32(got, expected)
    assert [recompute(model, row, KL)[1] for row in tokens] == want[1].tolist()


def test_packed_documents_leave_as_alone():
    model, documents = make_gated(mixer="gdn", loop_count=3), [prompt(1, n)[0] for n in (5, 9)]
    h, n = exit_states(
        model, torch.cat(documents)[None], GATE, torch.tensor([0, 5, 14], dtype=torch.int32)
    )
    alone = [exit_states(model, d[None], GATE) for d in documents]
    assert_same_fp32(h[0], torch.cat([a[0][0] for a in alone]))
    assert n[0].tolist() == torch.cat([a[1][0] for a in alone]).tolist()


def test_a_fixed_exit_runs_fewer_loops():
    model, tokens = make_gated(mixer="full", loop_count=3), prompt(1, 7)
    h, n = exit_states(model, tokens, ExitRule("loops", 2))
    assert n.unique().tolist() == [2] and len(model.inference_layout) == 3
    with exit_loops(model, ExitRule("loops", 2)):
        assert_same_fp32(model(tokens), model.logits_of(h))
        assert len(model.init_cache(1, 4).mixers) == 2


@pytest.mark.parametrize(
    "text", ["", "2.5", "gate", "gate:x", "gate:0", "gate:1", "kl:0", "kl:-1", "kl:nan", "both:0.5"]
)
def test_wrong_rules_are_refused(text):
    with pytest.raises(UserError, match="exit="):
        parse_exit(text)


@pytest.mark.parametrize("text", ["0", "-1", "5", "gate:0.5"])
def test_rules_that_a_model_cannot_follow_are_refused(text):
    args = make(mixer="full", loop_count=4).args
    with pytest.raises(UserError, match="exit="):
        check_exit(text, args, 4)


def test_rules_are_read_as_written():
    assert parse_exit("none") is None
    assert parse_exit("3") == ExitRule("loops", 3)
    assert parse_exit("gate:0.8") == ExitRule("gate", 0.8)
    assert parse_exit("kl:5e-4") == ExitRule("kl", 5e-4)
    assert math.isclose(parse_exit("kl:.1").limit, 0.1)
