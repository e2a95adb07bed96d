"""Native sparse attention: the blocked form, the decode step and the choice of blocks."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.attention.naive import naive_attention
from apps.LT2.kernel.nsa import (
    block_means,
    native_sparse_attention,
    native_sparse_attention_step,
)
from apps.LT2.kernel.nsa.blocks import choose_blocks
from apps.LT2.kernel.nsa.naive import chosen_blocks
from tests.tolerances import BY_DTYPE, FP32, FP64, assert_same

H, G, K = 8, 2, 4
NAMES = ("o", "dq", "dk", "dv", "dgates")
SIZES = {"block_size": 8, "n_blocks": 4, "window_size": 5}
OTHER_SIZES = {"block_size": 5, "n_blocks": 7, "window_size": 1}


def make_inputs(B, T, *, dtype=torch.float64, seed=0):
    """Make q, k, v and gates of B rows, all requiring gradients."""
    torch.manual_seed(seed)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K))
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    inputs.append(torch.rand(B, T, H, 3, dtype=dtype))
    return [x.requires_grad_() for x in inputs]


def one_branch(x, i):
    """Make gates of 1 for branch i and 0 for others."""
    gates = torch.zeros(*x.shape[:3], 3, dtype=x.dtype)
    gates[..., i] = 1
    return gates


def results(inputs, impl, *, sizes=SIZES, cu_seqlens=None):
    """Return the output and the gradients of a random projection of it."""
    o = native_sparse_attention(*inputs, **sizes, cu_seqlens=cu_seqlens, impl=impl)
    torch.manual_seed(1)
    weight = torch.randn(o.shape, dtype=torch.float64)
    return o, *torch.autograd.grad((o * weight).sum(), inputs)


def assert_all_same(got, want, bound):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_same(a, b, bound, name)


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def softmax_mean(q, keys, values):
    """Attend with one query to a list of keys; zero without keys."""
    if not keys:
        return torch.zeros_like(q)
    weights = torch.stack([(q @ k) / K**0.5 for k in keys]).softmax(0)
    return sum(w * v for w, v in zip(weights, values, strict=True))


def test_naive_is_the_definition_of_the_paper():
    """Compute it token by token, with block size 2, 4 blocks and window 3."""
    T, size = 15, 2
    q, k, v, gates = (x[0].detach() for x in make_inputs(1, T))
    got = native_sparse_attention(
        *(x[None] for x in (q, k, v, gates)), block_size=2, n_blocks=4, window_size=3, impl="naive"
    )
    for t in range(T):
        for g in range(G):
            heads = range(g * H // G, (g + 1) * H // G)
            complete = [range(s, s + size) for s in range(0, T, size) if s + size - 1 <= t]
            keys = [k[list(block), g].mean(0) for block in complete]
            values = [v[list(block), g].mean(0) for block in complete]

            importance = [0.0] * T
            for h in heads:
                if complete:
                    weights = torch.stack([q[t, h] @ key / K**0.5 for key in keys]).softmax(0)
                    for block, weight in enumerate(weights.tolist()):
                        importance[block] += weight
            own = t // size
            read = {b for b in (0, own - 1, own) if b >= 0}
            for block in sorted(range(own), key=lambda b: -importance[b]):
                if len(read) < min(4, own + 1):
                    read.add(block)
            tokens = [s for b in sorted(read) for s in range(b * size, b * size + size) if s <= t]
            window = range(max(0, t - 2), t + 1)
            for h in heads:
                branches = (
                    softmax_mean(q[t, h], keys, values),
                    softmax_mean(q[t, h], list(k[tokens, g]), list(v[tokens, g])),
                    softmax_mean(q[t, h], list(k[window, g]), list(v[window, g])),
                )
                want = sum(gate * o for gate, o in zip(gates[t, h], branches, strict=True))
                assert_same(got[0, t, h], want, FP64, f"query {t}, head {h}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("sizes", [SIZES, OTHER_SIZES])
@pytest.mark.parametrize("T", [1, 7, 8, 9, 200])
def test_blocked_equals_naive(T, sizes, dtype):
    inputs = make_inputs(2, T, dtype=dtype)
    got, want = (results(inputs, impl, sizes=sizes) for impl in ("blocked", "naive"))
    assert_all_same(got, want, BY_DTYPE[dtype])


@pytest.mark.parametrize("sizes", [SIZES, OTHER_SIZES])
@pytest.mark.parametrize(
    "lengths",
    [(5, 1, 64, 3, 65), (0, 130, 0, 2, 63, 0), (200,), (1,) * 30],
    ids=lambda lengths: "-".join(map(str, lengths[:6])),
)
def test_blocked_equals_naive_on_packed_documents(lengths, sizes):
    inputs, cu_seqlens = make_inputs(1, sum(lengths)), packed(lengths)
    got, want = (
        results(inputs, impl, sizes=sizes, cu_seqlens=cu_seqlens) for impl in ("blocked", "naive")
    )
    assert_all_same(got, want, FP64)


@pytest.mark.parametrize("impl", ["naive", "blocked"])
def test_packed_documents_equal_separate_ones(impl):
    lengths = (70, 0, 3, 64)
    cu_seqlens = packed(lengths)
    inputs = make_inputs(1, sum(lengths))
    o = native_sparse_attention(*inputs, **SIZES, cu_seqlens=cu_seqlens, impl=impl)
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        if start < end:
            document = [x[:, start:end] for x in inputs]
            want = native_sparse_attention(*document, **SIZES, impl=impl)
            assert_same(o[:, start:end], want, FP64)


@pytest.mark.parametrize("impl", ["naive", "blocked"])
@pytest.mark.parametrize("n_past", [1, 8, 63, 150, 199])
def test_last_queries_equal_those_of_the_whole(n_past, impl):
    q, k, v, gates = make_inputs(2, 200)
    want = native_sparse_attention(q, k, v, gates, **SIZES, impl="naive")
    got = native_sparse_attention(q[:, n_past:], k, v, gates[:, n_past:], **SIZES, impl=impl)
    assert_same(got, want[:, n_past:], FP64)


@pytest.mark.parametrize("impl", ["naive", "blocked"])
@pytest.mark.parametrize("T, n_blocks", [(8, 3), (63, 8), (64, 8), (70, 40)])
def test_choosing_all_blocks_is_full_attention(T, n_blocks, impl):
    """With fewer blocks than choices, no block counts twice."""
    q, k, v, _ = make_inputs(2, T)
    sizes = {"block_size": 8, "n_blocks": n_blocks, "window_size": 3}
    got = native_sparse_attention(q, k, v, one_branch(q, 1), **sizes, impl=impl)
    want = native_sparse_attention(
        q, k, v, one_branch(q, 2), block_size=8, n_blocks=3, window_size=T, impl="naive"
    )
    assert_same(got, want, FP64)
    assert_same(got, naive_attention(q, k, v), FP32, "the reference of softmax attention, in fp32")


@pytest.mark.parametrize("impl", ["naive", "blocked"])
def test_compressed_attention_is_zero_before_the_first_complete_block(impl):
    q, k, v, _ = make_inputs(2, 30)
    o = native_sparse_attention(q, k, v, one_branch(q, 0), **SIZES, impl=impl)
    assert not o[:, :7].any()
    assert_same(o[:, 7], v[:, :8].mean(1).repeat_interleave(H // G, 1), FP64, "one complete block")


def test_choice_equals_the_definition():
    torch.manual_seed(0)
    T, n_complete = 100, 12
    importance = torch.rand(T, G, n_complete)
    want = chosen_blocks(importance, T, 8, 5)
    padded = torch.nn.functional.pad(importance, (0, 1))  # an incomplete block has no importance
    own = (torch.arange(T) // 8)[:, None, None]
    got = choose_blocks(padded, torch.zeros_like(own), own, 5)
    for t in range(T):
        for g in range(G):
            blocks = [b for b in got[t, g].tolist() if b >= 0]
            assert len(set(blocks)) == len(blocks) == min(5, t // 8 + 1)
            assert sorted(blocks) == sorted(want[t][g])


def test_lowest_of_equal_blocks_is_chosen_at_any_length():
    """Weights that underflow are all zero; prefill and step must agree on them."""
    for n in (9, 30, 100, 3000):
        for first in (0, 7):  # of a document after others
            own = torch.tensor([first + n - 1])
            got = choose_blocks(torch.zeros(first + n + 2), torch.tensor([first]), own, 6)
            assert sorted(got.tolist()) == [0, 1, 2, 3, n - 2, n - 1]


@pytest.mark.parametrize("impl", ["naive", "blocked"])
def test_half_precision_inputs(impl):
    """All blocks are chosen, so rounding cannot change the choice."""
    inputs = [x.detach().bfloat16() for x in make_inputs(2, 60, dtype=torch.float32)]
    sizes = {"block_size": 8, "n_blocks": 8, "window_size": 5}
    o = native_sparse_attention(*inputs, **sizes, impl=impl)
    want = native_sparse_attention(*(x.float() for x in inputs), **sizes, impl="naive")
    assert o.dtype == torch.bfloat16
    assert_same(o, want, 2**-7)  # roundings of block means, branches and the sum


@pytest.mark.parametrize("sizes", [SIZES, OTHER_SIZES])
def test_steps_equal_forward(sizes):
    T, n_slots = 70, 80
    q, k, v, gates = (x.detach() for x in make_inputs(3, T, dtype=torch.float32))
    want = native_sparse_attention(q, k, v, gates, **sizes, impl="naive")
    size = sizes["block_size"]
    cache = [torch.full((3, n, G, K), 9.0) for n in (n_slots,) * 2 + (n_slots // size,) * 2]
    addresses = [x.data_ptr() for x in cache]
    options = {name: sizes[name] for name in ("n_blocks", "window_size")}
    got = []
    for t in range(T):
        token = (x[:, t] for x in (q, k, v, gates))
        position_B = torch.full((3,), t)
        got.append(native_sparse_attention_step(*token, tuple(cache), position_B, **options))
    assert_same(torch.stack(got, dim=1), want, FP32)
    assert addresses == [x.data_ptr() for x in cache]
    n_complete = T // size
    assert_same(cache[2][:, :n_complete], block_means(k, size)[:, :n_complete], FP32, "key means")


def test_rows_of_a_step_may_be_at_different_positions():
    q, k, v, gates = (x.detach() for x in make_inputs(3, 60, dtype=torch.float32))
    want = native_sparse_attention(q, k, v, gates, **SIZES, impl="naive")
    position_B = torch.tensor([0, 31, 59])
    row = torch.arange(3)
    k_cache, v_cache = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 4)) for x in (k, v))
    cache = (k_cache, v_cache, block_means(k_cache, 8), block_means(v_cache, 8))
    token = (x[row, position_B] for x in (q, k, v, gates))
    got = native_sparse_attention_step(*token, cache, position_B, n_blocks=4, window_size=5)
    assert_same(got, want[row, position_B], FP32)
