"""Cached decoding equals the full forward, for any split into prefills and steps."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.flops import cache_bytes
from lingua.errors import UserError
from tests.LT2.looped_models import assert_same_fp32, decode, make, packed, prompt


def test_cached_decode_equals_full_forward(model):
    tokens = prompt(2, 14)
    want = model(tokens)
    cache = model.init_cache(2, 14)
    got = [model.prefill(tokens[:, :5], cache), decode(model, cache, tokens[:, 5:])]
    assert_same_fp32(torch.cat(got, 1), want)
    assert cache.lengths == [14, 14]


@pytest.mark.parametrize("window", range(1, 8))
@pytest.mark.parametrize("loop_count", [1, 2, 4])
def test_every_window_size_decodes_exactly(window, loop_count):
    tokens = prompt(2, 6)
    model = make(mixer="window", default_sliding_window=window, loop_count=loop_count)
    want = model(tokens)
    for n_prompt in range(1, 7):
        cache = model.init_cache(2, 6)
        got = [model.prefill(tokens[:, :n_prompt], cache)]
        got += [decode(model, cache, tokens[:, n_prompt:])] if n_prompt < 6 else []
        assert_same_fp32(torch.cat(got, 1), want)


def test_a_window_wider_than_the_sequence_is_full_attention():
    tokens = prompt(2, 6)
    full = make(mixer="full")
    assert_same_fp32(make(mixer="window", default_sliding_window=6)(tokens), full(tokens))
    narrower = make(mixer="window", default_sliding_window=5)(tokens)
    assert_same_fp32(narrower[:, :5], full(tokens)[:, :5])
    assert not torch.allclose(narrower[:, 5], full(tokens)[:, 5])


def test_split_prompt_decodes_exactly(model):
    tokens = prompt(2, 12)
    want = model(tokens)
    cache = model.init_cache(2, 12)
    parts = [model.prefill(part, cache) for part in tokens[:, :9].split([4, 1, 4], 1)]
    assert_same_fp32(torch.cat([*parts, decode(model, cache, tokens[:, 9:])], 1), want)


def test_packed_prompts_of_different_lengths_decode_exactly(model):
    streams = [prompt(1, n + 4)[0] for n in (7, 1, 12)]
    want = [model(s[None])[0] for s in streams]
    tokens, cu_seqlens = packed([s[:-4] for s in streams])
    cache = model.init_cache(3, 16)
    got = model.prefill(tokens, cache, cu_seqlens=cu_seqlens)
    assert_same_fp32(got[0], torch.cat([w[:-4] for w in want]))
    got = decode(model, cache, torch.stack([s[-4:] for s in streams]))
    assert_same_fp32(got, torch.stack([w[-4:] for w in want]))
    assert cache.lengths == [11, 5, 16]


def test_last_only_returns_the_last_logits_of_each_sequence(model):
    streams = [prompt(1, n)[0] for n in (7, 1, 12)]
    want = torch.stack([model(s[None])[0, -1:] for s in streams])
    tokens, cu_seqlens = packed(streams)
    cache = model.init_cache(3, 12)
    got = model.prefill(tokens, cache, cu_seqlens=cu_seqlens, last_only=True)
    assert_same_fp32(got, want)
    cache = model.init_cache(2, 12)
    tokens = prompt(2, 7)
    assert_same_fp32(model.prefill(tokens, cache, last_only=True), model(tokens)[:, -1:])


def test_an_empty_document_has_no_last_logits():
    model = make()
    cache, cu_seqlens = model.init_cache(3, 8), torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"no last position in sequences of \[3, 0, 2\]"):
        model.prefill(prompt(1, 5), cache, cu_seqlens=cu_seqlens, last_only=True)
    assert cache.lengths == [0, 0, 0]


def test_a_finished_row_is_refilled_while_others_continue(model):
    streams, refill = prompt(3, 12), prompt(1, 15)[:, :9]
    want, want_refill = model(streams), model(refill)
    cache = model.init_cache(3, 12)
    model.prefill(streams[:, :5], cache)
    cache.reset([1])
    got = model.prefill(refill[:, :3], cache, rows=torch.tensor([1]))
    assert_same_fp32(got, want_refill[:, :3])
    inputs = streams[:, 5:11].clone()
    inputs[1] = refill[0, 3:]
    got = decode(model, cache, inputs)
    assert_same_fp32(got[[0, 2]], want[[0, 2], 5:11])
    assert_same_fp32(got[1], want_refill[0, 3:])
    assert cache.lengths == [11, 9, 11]
    cache.reset()
    assert cache.lengths == [0, 0, 0]
    assert_same_fp32(model.prefill(streams, cache), want)


def test_every_loop_and_layer_has_its_own_cache(model):
    cache = model.init_cache(3, 10)
    assert [len(loop) for loop in cache.mixers] == [model.args.n_layers] * model.args.loop_count
    tensors = [t for loop in cache.mixers for mixer in loop for t in mixer._tensors() if t.numel()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    n_bytes = sum(t.nbytes for t in tensors if t.is_floating_point())  # no counters
    assert n_bytes == 3 * cache_bytes(model, 10, torch.float32)


def test_decoding_keeps_no_graph(model):
    """A cache in an autograd graph would keep every step since the prompt."""
    cache = model.init_cache(1, 4)
    logits = [model.prefill(prompt(1, 3), cache), model.step(prompt(1, 1), cache)]
    tensors = [t for loop in cache.mixers for mixer in loop for t in mixer._tensors()]
    assert not any(t.requires_grad for t in (*logits, *tensors))


def test_a_full_cache_is_a_user_error_and_stays_unchanged():
    model = make()
    cache = model.init_cache(2, 4)
    model.prefill(prompt(2, 3), cache)
    with pytest.raises(UserError, match="max_seqlen=4"):
        model.prefill(prompt(2, 2), cache)
    model.step(prompt(2, 1), cache)
    with pytest.raises(UserError, match="max_seqlen=4"):
        model.step(prompt(2, 1), cache)
    assert cache.lengths == [4, 4]
