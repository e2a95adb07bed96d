"""DeepSeek sparse attention: the blocked operator against its definition, ties, and memory.

Comparisons are in fp64, where rounding does not change the choice of keys. Shapes: B batch, T
queries, S keys, H query heads, G key/value heads, K head dim, J index heads, C index dim.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apps.LT2.kernel.attention.naive import naive_attention, visible_keys
from apps.LT2.kernel.dsa import Index, blocked, blocks, dsa, dsa_step, plain
from apps.LT2.kernel.dsa.operator import _backward, _forward, kernels_support
from apps.LT2.kernel.dsa.selection import (
    pack_bits,
    select_top_k,
    selected_indices,
    unpack_bits,
)
from tests.tolerances import FP32, FP64, assert_same

H, G, K, J, C = 4, 2, 8, 3, 6
NAMES = ("q", "k", "v", "index.q", "index.k", "index.w")


def make_inputs(B, T, S=None, dtype=torch.float64):
    torch.manual_seed(0)
    S = S or T
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, J, C), (B, S, C), (B, T, J)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def run(inputs, impl="blocked", **options):
    q, k, v, *index = inputs
    return dsa(q, k, v, Index(*index), with_loss=True, impl=impl, **options)


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.fixture
def small_blocks(monkeypatch):
    """Use blocks of 16 queries, the minimum."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1)


def assert_equals_naive(inputs, **options):
    results = []
    for impl in ("blocked", "naive"):
        o, loss = run(inputs, impl, **options)
        torch.manual_seed(1)
        probe = torch.randn(o.shape, dtype=o.dtype)
        grads = torch.autograd.grad((o * probe).sum() + 3 * loss, inputs)
        results.append((o, loss, *grads))
    for name, got, want in zip(("o", "loss", *NAMES), *results, strict=True):
        assert_same(got, want, FP64, name)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("top_k", [None, 1, 7, 33, 200])
@pytest.mark.parametrize("T", [1, 16, 65])
def test_blocked_equals_naive(T, top_k):
    assert_equals_naive(make_inputs(2, T), top_k=top_k)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("top_k", [None, 2, 20])
def test_queries_may_be_the_last_of_the_tokens(top_k):
    assert_equals_naive(make_inputs(2, 35, 60), top_k=top_k)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("top_k", [None, 2, 20])
@pytest.mark.parametrize("lengths", [(3, 0, 57, 1, 39), (0, 16, 16, 0), (1, 1, 1)])
def test_blocked_equals_naive_on_packed_documents(lengths, top_k):
    inputs = make_inputs(1, sum(lengths))
    assert_equals_naive(inputs, top_k=top_k, cu_seqlens=cu_seqlens_of(lengths))


@pytest.mark.usefixtures("small_blocks")
def test_cu_seqlens_overwritten_in_place():
    """The host copy of cu_seqlens is updated with its content."""
    inputs, buffer = make_inputs(1, 60), cu_seqlens_of((50, 10))
    run(inputs, top_k=5, cu_seqlens=buffer)
    buffer.copy_(cu_seqlens_of((20, 40)))
    assert_equals_naive(inputs, top_k=5, cu_seqlens=buffer)


def test_one_block_equals_many(monkeypatch):
    inputs = make_inputs(2, 70)
    o, loss = run(inputs, top_k=9)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1)
    for got, want in zip(run(inputs, top_k=9), (o, loss), strict=True):
        assert_same(got, want, FP64)


@pytest.mark.parametrize("top_k", [None, 40, 41, 1000])
def test_with_no_choice_it_is_causal_attention(top_k):
    inputs = [x.detach().float() for x in make_inputs(2, 40)]
    o, _ = run(inputs, top_k=top_k)
    assert_same(o, naive_attention(*inputs[:3]), FP32)


def test_output_and_loss_train_different_inputs():
    """The output's gradient does not reach the indexer, nor the loss's gradient q, k and v."""
    inputs = make_inputs(1, 40)
    o, loss = run(inputs, top_k=7)
    by_output = torch.autograd.grad(o.sum(), inputs, allow_unused=True, retain_graph=True)
    by_loss = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    by_both = torch.autograd.grad(o.sum() + loss, inputs)
    for i, (alone, other) in enumerate([(by_output, by_loss)] * 3 + [(by_loss, by_output)] * 3):
        assert other[i] is None, NAMES[i]
        assert torch.equal(by_both[i], alone[i]) and alone[i].any(), NAMES[i]


def test_the_loss_of_a_perfect_indexer_is_zero():
    """The scores of one index head equal the logits of the only head, so softmax(I) is p."""
    torch.manual_seed(0)
    q, k = (
        torch.rand(1, 30, 1, K).double(),
        torch.rand(1, 30, 1, K).double(),
    )  # ReLU changes nothing
    index = Index(q, k[:, :, 0], torch.full((1, 30, 1), K**-0.5).double())
    for top_k in (None, 5):
        _, loss = dsa(q, k, torch.randn_like(k), index, top_k=top_k, with_loss=True)
        assert loss.item() == pytest.approx(0, abs=FP64)
        wrong = index._replace(w_BTJ=-index.w_BTJ)
        assert dsa(q, k, k, wrong, top_k=top_k, with_loss=True)[1].item() > 1e-3


# ---- selection


def brute_force(scores, visible, top_k):
    """Select the largest scores first; of equal ones the later key."""
    selected = torch.zeros_like(visible)
    for t in range(len(scores)):
        keys = [s for s in range(scores.shape[1]) if visible[t, s]]
        for s in sorted(keys, key=lambda s: (-scores[t, s].item(), -s))[:top_k]:
            selected[t, s] = True
    return selected


@pytest.mark.parametrize("top_k", [1, 3, 8, 29, 30, 50])
@pytest.mark.parametrize("scores", ["zeros", "few values", "signed zeros", "relu", "random"])
def test_equal_scores_are_ranked_by_position(scores, top_k):
    torch.manual_seed(0)
    scores = {
        "zeros": torch.zeros(30, 30),
        "few values": torch.randint(3, (30, 30)).float(),
        "signed zeros": torch.zeros(30, 30) * torch.randn(30, 30).sign(),
        "relu": torch.randn(30, 30).relu() * torch.randn(30, 1),
        "random": torch.randn(30, 30),
    }[scores]
    visible = visible_keys(30, window=None, cu_seqlens=None, device="cpu")
    selected = select_top_k(scores[None], visible, top_k)[0]
    assert torch.equal(selected, brute_force(scores, visible, top_k))
    seen = torch.arange(1, 31).clamp(max=top_k)
    assert torch.equal(selected.sum(-1), seen)

    for t in (0, 7, 29):  # as a decode step chooses, with empty slots
        row = select_top_k(scores[None, t : t + 1], visible[t : t + 1], top_k)[0]
        assert torch.equal(row[0], selected[t])


def test_selected_indices_match_the_mask():
    torch.manual_seed(0)
    selected = torch.rand(5, 20) < torch.tensor([0, 0.2, 0.4, 0, 0.3])[:, None]
    selected[3, -6:] = True
    indices, count = selected_indices(selected, 12)
    assert indices.shape == (5, 12)
    for row, mask in enumerate(selected):
        assert indices[row, : count[row]].tolist() == mask.nonzero()[:, 0].tolist()
        assert not indices[row, count[row] :].any()


@pytest.mark.parametrize("size", [1, 8, 9, 63])
def test_unpack_bits_undoes_pack_bits(size):
    mask = torch.rand(3, 4, size) < 0.5
    bits = pack_bits(mask)
    assert bits.shape == (3, 4, (size + 7) // 8) and bits.dtype == torch.uint8
    assert torch.equal(unpack_bits(bits, size), mask)


# ---- decode


@pytest.mark.parametrize("weights", ["random", "zero", "negative"])
@pytest.mark.parametrize("top_k", [1, 5, 16, 40, 100])
def test_step_equals_the_last_query(top_k, weights):
    """Also with many equal scores: ReLU makes zeros, and a weight of 0 makes all equal."""
    inputs = [x.detach() for x in make_inputs(3, 40)]
    inputs[5] = {"random": inputs[5], "zero": 0 * inputs[5], "negative": -inputs[5].abs()}[weights]
    q, k, v, index_q, index_k, w = inputs
    want, _ = run(inputs, top_k=top_k)
    for t in (0, 4, 5, 39):
        n_valid = torch.full((3,), t + 1)
        index = Index(index_q[:, t : t + 1], index_k, w[:, t : t + 1])
        got = dsa_step(q[:, t], k, v, index, n_valid, top_k=top_k)
        assert_same(got, want[:, t], FP64, f"token {t}")


def test_a_step_reads_only_the_selected_keys_and_values():
    q, k, v, index_q, index_k, w = [x.detach() for x in make_inputs(2, 40)]
    index = Index(index_q[:, -1:], index_k, w[:, -1:])
    n_valid = torch.tensor([40, 3])
    want = dsa_step(q[:, -1], k, v, index, n_valid, top_k=5)
    scores = torch.einsum("bjc,bsc->bjs", index_q[:, -1], index_k).relu()
    scores = torch.einsum("bjs,bj->bs", scores, w[:, -1])
    visible = torch.arange(40) < n_valid[:, None]
    unread = ~select_top_k(scores[:, None], visible[:, None], 5)[:, 0]
    assert unread.sum().item() == 35 + 37
    unread[1, 0] = False  # fills the unused slots of the row, and is masked
    k[unread], v[unread] = torch.nan, torch.nan
    assert torch.equal(dsa_step(q[:, -1], k, v, index, n_valid, top_k=5), want)


# ---- memory and the operator


class Largest(TorchDispatchMode):
    """Record the bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() for x in tree_leaves(out) if torch.is_tensor(x))
        self.nbytes = max(self.nbytes, *sizes, 0)
        return out


@pytest.mark.usefixtures("small_blocks")
def test_no_tensor_of_all_queries_by_all_keys():
    T = 1024
    q, k, v, *index = [x.detach() for x in make_inputs(1, T, dtype=torch.float32)]
    with Largest() as forward:
        out = blocked.forward(
            q,
            k,
            v,
            Index(*index),
            None,
            100,
            with_loss=True,
            keep_selection=True,
        )
    with Largest() as backward:
        plain.backward(q, k, v, out.bits_BTX, None, torch.ones_like(q))
    # A block has 16 queries; the whole selection has one bit per pair.
    assert max(forward.nbytes, backward.nbytes) <= max(4 * H * 16 * T, T * T // 8)
    assert out.bits_BTX.nbytes == T * T // 8


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("top_k, with_loss", [(7, True), (7, False), (40, True)])
def test_operator_is_registered_well(packed, top_k, with_loss):
    """Check schema, fake shapes, autograd and dynamic shapes with torch's own check."""
    cu_seqlens = cu_seqlens_of((3, 37)) if packed else None
    inputs = make_inputs(1, 40, dtype=torch.float32)
    torch.library.opcheck(_forward, (*inputs, cu_seqlens, top_k, with_loss, True, False))
    with torch.no_grad():
        o, lse, bits, *_ = _forward(*inputs, cu_seqlens, top_k, with_loss, True, False)
    saved = (*(x.detach() for x in inputs[:3]), o, lse, bits, cu_seqlens, o)
    torch.library.opcheck(_backward, saved, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("packed", [False, True])
def test_block_compiles_whole(packed):
    """One graph with eager's results; tests/gpu covers Inductor."""
    cu_seqlens = cu_seqlens_of((3, 37)) if packed else None
    inputs = make_inputs(1, 40)

    def block(q, *rest):
        o, loss = run((q * 2, *rest), top_k=7, cu_seqlens=cu_seqlens)
        return o.sin().sum() + loss

    want = block(*inputs)
    torch.compiler.reset()
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    assert_same(got, want, FP64)
    grads = (torch.autograd.grad(x, inputs) for x in (got, want))
    for name, a, b in zip(NAMES, *grads, strict=True):
        assert_same(a, b, FP64, name)


@pytest.mark.parametrize(
    "B, heads, index_heads, can", [(4095, 16, 4, True), (4096, 16, 4, False), (16384, 2, 4, False)]
)
def test_kernels_support_no_more_heads_than_a_grid(B, heads, index_heads, can):
    with FakeTensorMode():
        options = {"device": "cuda", "dtype": torch.bfloat16}
        q, k = torch.empty(B, 1, heads, 64, **options), torch.empty(B, 1, 1, 64, **options)
        index_q = torch.empty(B, 1, index_heads, 64, **options)
        index = Index(index_q, torch.empty(B, 1, 64, **options), torch.empty(B, 1, index_heads))
        assert kernels_support(q, k, index) == can
