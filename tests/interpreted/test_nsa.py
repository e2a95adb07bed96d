"""The kernels of native sparse attention against the definition.

In fp32 both choose the same blocks: importances of random inputs differ by more than rounding.
"""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.nsa import naive, triton_compressed
from apps.LT2.kernel.nsa.triton import _selected, sparse_branches_triton
from apps.LT2.kernel.nsa.triton_tiles import TILES
from tests.tolerances import FP32, FP32_GRAD, assert_same

NAMES = ("q", "k", "v")


def branches_by_definition(q, k, v, *, block_size, n_blocks, cu_seqlens):
    """Return compressed and selected attention of the queries, the last of S tokens."""
    offsets = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = []
    for b in range(len(q)):
        documents = []
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            if start == end:
                continue
            queries = q[b] if cu_seqlens is None else q[b, start:end]
            q_TGRK = queries.unflatten(1, (k.shape[2], -1))
            tokens = (k[b, start:end], v[b, start:end])
            compressed, importance = naive.compressed_attention(q_TGRK, *tokens, block_size)
            chosen = naive.chosen_blocks(importance, end - start, block_size, n_blocks)
            selected = naive.selected_attention(q_TGRK, *tokens, chosen, block_size)
            documents.append(torch.stack([compressed, selected]).flatten(2, 3))
        rows.append(torch.cat(documents, 1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    "B, T, past, heads, size, n_blocks, lengths",
    [
        (2, 2, 4, (2, 2, 16), 2, 3, None),  # queries continue a past
        (1, 19, 0, (3, 1, 24), 5, 3, (1, 8, 0, 10)),  # padded heads, head dim and block
        (1, 7, 0, (5, 1, 16), 2, 3, None),  # parts of a group
        (1, 13, 0, (1, 1, 130), 4, 3, None),  # the tiles of large head dims
        (1, 17, 0, (1, 1, 16), 1, 3, None),  # more means than a tile has
        (1, 18, 0, (2, 1, 16), 17, 3, None),  # a block is longer than a tile
    ],
)
def test_output_and_every_gradient(monkeypatch, B, T, past, heads, size, n_blocks, lengths):
    """Use small tiles, and choose for at most 16 queries at a time."""
    monkeypatch.setitem(TILES, 64, (16, 16, 4, 3))
    monkeypatch.setattr(triton_compressed, "MAX_IMPORTANCES", 1)
    monkeypatch.setattr(triton_compressed, "PARTS", 2)
    torch.manual_seed(0)
    H, G, K = heads
    inputs = [torch.randn(B, T, H, K), *(torch.randn(B, past + T, G, K) for _ in range(2))]
    inputs = [x.requires_grad_() for x in inputs]
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    options = {"block_size": size, "n_blocks": n_blocks, "cu_seqlens": cu_seqlens}
    got = torch.stack(sparse_branches_triton(*inputs, **options))
    want = branches_by_definition(*inputs, **options)
    for name, a, b in zip(("compressed", "selected"), got, want, strict=True):
        assert_same(a, b, FP32, name)
    do = torch.randn(got.shape)
    for branch in range(2):
        grads, want_grads = (
            torch.autograd.grad((o[branch] * do[branch]).sum(), inputs, retain_graph=True)
            for o in (got, want)
        )
        for name, a, b in zip(NAMES, grads, want_grads, strict=True):
            assert_same(a, b, FP32_GRAD, f"branch {branch}, gradient of {name}")


def test_of_equal_blocks_the_lower_number_is_chosen():
    """Scores of zero make all blocks equal; the second document starts with block 2."""
    T, n_blocks = 14, 5
    own_T = torch.cat([torch.arange(2), torch.arange(2, T)]).int()
    first_T = torch.where(own_T < 2, 0, 2).int()
    q, means = torch.zeros(1, T, 1, 16), torch.randn(1, T, 1, 16)
    *_, chosen = triton_compressed.attend_means(
        q, means, means, first_T, own_T, own_T + 1, n_blocks
    )
    want = [choice(t - first, n_blocks) for t, first in enumerate(first_T.tolist())]
    assert chosen[0, :, 0].tolist() == want


def choice(own, n_blocks):
    """Return the first block, the own, the one before, and the lowest others; then -1."""
    always = {0, max(own - 1, 0), own}
    others = [block for block in range(own) if block not in always]
    blocks = sorted([*always, *others[: n_blocks - len(always)]])
    return blocks + [-1] * (n_blocks - len(blocks))


def test_selected_attention_reads_the_given_blocks():
    """A query's blocks are in any order, with unused slots anywhere."""
    torch.manual_seed(0)
    T, size, R = 9, 3, 2
    chosen_Tn = torch.full((T, 4), -1, dtype=torch.int32)
    for t in range(T):
        own = t // size
        blocks = torch.tensor([own, *(b for b in range(own) if torch.rand(()) < 0.5)])
        chosen_Tn[t, torch.randperm(4)[: len(blocks)]] = blocks.int()
    inputs = [torch.randn(1, T, n, 16).requires_grad_() for n in (R, 1, 1)]
    start_C = torch.arange(0, T, size).int()
    tables = (torch.zeros(T).int(), start_C, torch.full_like(start_C, size))
    o, _ = _selected(*inputs, chosen_Tn[None, :, None], *tables, size)
    q, k, v = (x[0] for x in inputs)
    choices = [[[b for b in blocks if b >= 0]] for blocks in chosen_Tn.tolist()]
    want = naive.selected_attention(q[:, None], k, v, choices, size)
    do = torch.randn(T, 1, R, 16)
    assert_same(o[0], want[:, 0], FP32, "o")
    got_grads = torch.autograd.grad((o[0] * do[:, 0]).sum(), inputs)
    for name, a, b in zip(
        NAMES, got_grads, torch.autograd.grad((want * do).sum(), inputs), strict=True
    ):
        assert_same(a, b, FP32_GRAD, f"gradient of {name}")
