"""What the operators on fla's kernels share, on operators that run without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apps.LT2.kernel.documents import upload_cu_seqlens
from apps.LT2.kernel.fla import (
    chunk_offsets,
    packed_arguments,
    packed_tokens,
    register_gradient,
)
from tests.waiting import no_waiting

SCALE = 0.5


def toy(q, k, v, g, state, scale):
    """o (B, T, H, K) and the final state (B, H, K)."""
    final = (k * v).sum(1)
    return scale * q * k * v * g.exp()[..., None], final if state is None else final + 3 * state


@torch.library.custom_op("lt2_test::toy", mutates_args=())
def toy_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, final state, what is kept of the decay, and a product that is kept, too."""
    return *toy(q, k, v, g, state, scale), g.exp(), q * k


@torch.library.custom_op("lt2_test::toy_backward", mutates_args=())
def toy_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    qk: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    do = scale * do * decay[..., None]
    dkv = torch.zeros_like(k) if dfinal is None else dfinal[:, None].expand_as(k)
    dg = q.new_empty(0) if decay.ndim == 1 else (do * qk * v).sum(-1)
    dstate = q.new_empty(0)
    if state is not None:
        dstate = torch.zeros_like(state) if dfinal is None else 3 * dfinal
    return do * k * v, do * q * v + dkv * v, do * qk + dkv * k, dg, dstate


register_gradient(toy_forward, toy_backward, sums_decay=True)


@pytest.mark.parametrize("constant_decay", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("read", ["o", "final", "both"])
def test_gradients_reach_every_input(read, with_state, constant_decay):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = (normal(2, 5, 3, 4) for _ in range(3))
    g = normal(3).detach() if constant_decay else normal(2, 5, 3)
    state = normal(2, 3, 4) if with_state else None
    inputs = [x for x in (q, k, v, g, state) if x is not None and x.requires_grad]

    def gradients(o, final):
        loss = torch.zeros((), dtype=torch.float64)
        if read != "final":
            loss = loss + o.sin().sum()
        if read != "o":
            loss = loss + final.cos().sum()
        # final does not depend on q and g, nor o on the state: no gradient, or one of zeros
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [torch.zeros_like(x) if d is None else d for x, d in zip(inputs, found, strict=True)]

    o, final, decay, qk = toy_forward(q, k, v, g, state, None, SCALE)
    assert not decay.requires_grad and not qk.requires_grad
    got, want = gradients(o, final), gradients(*toy(q, k, v, g, state, SCALE))
    for d, w in zip(got, want, strict=True):
        torch.testing.assert_close(d, w)


# ---- tables of packed documents


def test_chunks_are_numbered_by_document():
    packed = packed_arguments(upload_cu_seqlens([0, 64, 64, 129, 130], "cpu"))
    assert packed["cu_seqlens"].tolist() == [0, 64, 64, 129, 130]
    # An empty document has no chunk, and its number.
    assert packed["chunk_indices"].tolist() == [[0, 0], [2, 0], [2, 1], [3, 0]]
    assert {x.dtype for x in packed.values()} == {torch.int32}
    assert packed_arguments(None) == {}


def test_tokens_are_numbered_by_documents_that_have_some():
    bounds, tokens = packed_tokens(upload_cu_seqlens([0, 0, 3, 3, 3, 5, 5], "cpu"))
    assert bounds is not None and tokens is not None
    assert bounds.tolist() == [0, 3, 5]
    assert tokens.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert {bounds.dtype, tokens.dtype} == {torch.int32}
    assert packed_tokens(None) == (None, None)


def test_the_host_knows_how_many_chunks_there_are():
    cu_seqlens = upload_cu_seqlens([0, 64, 64, 129, 130], "cpu")
    with no_waiting():
        offsets = chunk_offsets(cu_seqlens, 64)
        assert offsets[-1].item() == 4
        assert chunk_offsets(cu_seqlens, 64) is offsets
    assert offsets.dtype == torch.int64 and offsets.data_ptr()
    assert offsets.tolist() == [0, 1, 1, 3, 4]
    assert chunk_offsets(cu_seqlens, 16).tolist() == [0, 4, 4, 9, 10]
    cu_seqlens.copy_(torch.tensor([0, 64, 65, 129, 130]))
    assert chunk_offsets(cu_seqlens, 64).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("tables", [lambda b: tuple(packed_arguments(b).values()), packed_tokens])
def test_tables_are_shared_until_the_bounds_change(tables):
    """fla keeps tables of its own by the identity of the bounds."""
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    first = tables(cu_seqlens)
    assert all(a is b for a, b in zip(first, tables(cu_seqlens), strict=True))
    cu_seqlens.copy_(torch.tensor([0, 1, 5]))
    second = tables(cu_seqlens)
    assert second[0].tolist() == [0, 1, 5] and first[0].tolist() == [0, 2, 5]
    assert second[0] is not first[0]


@pytest.mark.parametrize("tables", [packed_arguments, packed_tokens])
def test_tables_of_bounds_that_the_host_has_wait_for_nothing(tables):
    cu_seqlens = upload_cu_seqlens([0, 2, 5], "cpu")
    with no_waiting():
        tables(cu_seqlens)
