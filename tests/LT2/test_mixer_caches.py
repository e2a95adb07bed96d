"""The contract of every mixer's cache: any split into prefills and steps equals one forward."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.LT2.mixer_cases import (
    DOCUMENT_LENGTHS,
    LENGTHS,
    Decoder,
    assert_same_fp32,
    make,
    packed,
    tokens,
)
from tests.tolerances import FP32, assert_same


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_prefill_then_step_equals_forward(case, seqlen):
    mixer, x = make(case), tokens(2, seqlen + 3)
    decoder = Decoder(case, mixer, 2, seqlen + 3)
    got = [decoder.prefill(x[:, :seqlen]), decoder.steps(x[:, seqlen:])]
    assert_same_fp32(torch.cat(got, 1), mixer(x, window=case.window))


def test_steps_alone_equal_forward(case):
    mixer, x = make(case), tokens(2, 14)
    assert_same_fp32(Decoder(case, mixer, 2, 14).steps(x), mixer(x, window=case.window))


@pytest.mark.parametrize("seqlen, splits", [(12, range(1, 12)), (200, (1, 63, 64, 65, 136))])
def test_prompt_may_be_split_at_any_point(case, seqlen, splits):
    mixer, x = make(case), tokens(2, seqlen + 3)
    want = mixer(x, window=case.window).detach()
    for split in splits:
        decoder = Decoder(case, mixer, 2, seqlen + 3)
        got = [
            decoder.prefill(x[:, :split]),
            decoder.prefill(x[:, split:seqlen]),
            decoder.steps(x[:, seqlen:]),
        ]
        assert_same(torch.cat(got, 1), want, FP32, f"split at {split}")


def test_prefill_continues_after_steps(case):
    mixer, x = make(case), tokens(2, 20)
    decoder = Decoder(case, mixer, 2, 20)
    got = [
        decoder.prefill(x[:, :6]),
        decoder.steps(x[:, 6:9]),
        decoder.prefill(x[:, 9:17]),
        decoder.steps(x[:, 17:]),
    ]
    assert_same_fp32(torch.cat(got, 1), mixer(x, window=case.window))


@pytest.mark.parametrize("lengths", [DOCUMENT_LENGTHS, [1, 1, 1], [0, 5, 0, 0, 3, 0], [200]])
def test_packed_equals_separate(case, lengths):
    mixer = make(case)
    documents = [tokens(1, n + 2)[0] for n in lengths]
    separate = [mixer(d[None], window=case.window)[0] for d in documents]

    x, cu_seqlens = packed([d[:n] for d, n in zip(documents, lengths, strict=True)])
    want = torch.cat([s[:n] for s, n in zip(separate, lengths, strict=True)])[None]
    assert_same_fp32(mixer(x, cu_seqlens=cu_seqlens, window=case.window), want)

    decoder = Decoder(case, mixer, len(lengths), max(lengths) + 2)
    assert_same_fp32(decoder.prefill(x, cu_seqlens=cu_seqlens), want)
    ends = torch.stack([d[-2:] for d in documents])
    assert_same_fp32(decoder.steps(ends), torch.stack([s[-2:] for s in separate]))


def test_packed_prompts_continue_their_rows(case):
    """The second packed prefill has new rows, in another order than the cache's."""
    mixer = make(case)
    first, second = {0: 3, 2: 70, 3: 1}, {3: 64, 1: 9, 0: 1, 2: 5}
    streams = [tokens(1, 80 + row)[0] for row in range(4)]
    want = [mixer(s[None], window=case.window)[0] for s in streams]
    decoder = Decoder(case, mixer, 4, 90)
    seen = [0] * 4
    for part in (first, second):
        spans = {row: slice(seen[row], seen[row] + n) for row, n in part.items()}
        x, cu_seqlens = packed([streams[row][span] for row, span in spans.items()])
        got = decoder.prefill(x, cu_seqlens=cu_seqlens, rows=torch.tensor(list(part)))
        assert_same_fp32(got[0], torch.cat([want[row][span] for row, span in spans.items()]))
        for row, n in part.items():
            seen[row] += n
    nexts = torch.stack([streams[row][seen[row] : seen[row] + 3] for row in range(4)])
    wants = torch.stack([want[row][seen[row] : seen[row] + 3] for row in range(4)])
    assert_same_fp32(decoder.steps(nexts), wants)


def test_batch_rows_do_not_mix(case):
    mixer, x = make(case), tokens(3, 70)
    other = x.clone()
    other[1] = tokens(1, 71)[0, :70]
    kept = torch.tensor([0, 2])
    outputs = []
    for batch in (x, other):
        decoder = Decoder(case, mixer, 3, 70)
        cached = [decoder.prefill(batch[:, :66]), decoder.steps(batch[:, 66:])]
        outputs.append((mixer(batch, window=case.window)[kept], torch.cat(cached, 1)[kept]))
    (forward, cached), (forward_other, cached_other) = outputs
    assert torch.equal(forward, forward_other)
    assert torch.equal(cached, cached_other)


def test_one_row_is_refilled_while_others_continue(case):
    mixer = make(case)
    streams, refill = tokens(3, 24), tokens(1, 30)[:, :18]
    want, want_refill = (mixer(s, window=case.window) for s in (streams, refill))
    decoder = Decoder(case, mixer, 3, 24)
    decoder.prefill(streams[:, :10])
    decoder.steps(streams[:, 10:12])

    row = torch.tensor([1])
    decoder.cache.reset(row)
    assert_same_fp32(decoder.prefill(refill[:, :7], rows=row), want_refill[:, :7])
    inputs = streams[:, 12:].clone()
    inputs[1, :11] = refill[0, 7:]
    got = decoder.steps(inputs[:, :11])
    assert_same_fp32(got[[0, 2]], want[[0, 2], 12:23])
    assert_same_fp32(got[1], want_refill[0, 7:])


def test_a_reset_cache_is_empty(case):
    mixer, x = make(case), tokens(2, 12)
    decoder = Decoder(case, mixer, 2, 12)
    decoder.prefill(tokens(2, 11))
    decoder.cache.reset()
    got = torch.cat([decoder.prefill(x[:, :9]), decoder.steps(x[:, 9:])], 1)
    assert_same_fp32(got, mixer(x, window=case.window))


def test_caches_are_written_in_place(case):
    """A captured decode step reads and writes fixed addresses."""
    decoder, x = Decoder(case, make(case), 2, 12), tokens(2, 12)

    def addresses() -> list[int]:
        return [t.data_ptr() for t in decoder.cache._tensors()]

    allocated = addresses()
    decoder.prefill(x[:, :4])
    decoder.prefill(x[:, 4:7])
    decoder.steps(x[:, 7:])
    decoder.cache.reset(torch.tensor([0]))
    assert addresses() == allocated


def test_state_bytes_are_what_init_cache_allocates(case):
    mixer = make(case)
    for seqlen, dtype in itertools.product((1, 65, 200), (torch.float32, torch.bfloat16)):
        cache = Decoder(case, mixer, 3, seqlen, dtype).cache
        held = [t.nbytes for t in cache._tensors() if t.is_floating_point()]  # no counters
        assert sum(held) == 3 * mixer.state_bytes(seqlen, dtype, case.window), (seqlen, dtype)
        n_bytes = sum(t.nbytes for t in cache._tensors())
        assert n_bytes - sum(held) <= 3 * 8  # one int64 counter a row at most
