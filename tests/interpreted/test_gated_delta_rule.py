"""The backward kernel of the delta rules against autograd of the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from apps.LT2.kernel.gated_delta_rule import gated_delta_rule
from apps.LT2.kernel.gated_delta_rule.backward import input_gradients
from tests.tolerances import FP32_GRAD, assert_same

H, C = 2, 64


def chunk_form(q, k, v, g, beta, state, documents):
    """Run the chunk form of README.md. Return o, final states, and what its backward reads.

    documents  (row, first token, end) of each sequence
    """
    o, final = torch.zeros_like(v), []
    g_sum, solved = torch.zeros_like(g), torch.zeros(*g.shape, C)
    u, h, ends = torch.zeros_like(v), [], []
    writes = []
    for n, (b, start, end) in enumerate(documents):
        S = state[n]
        for first in range(start, end, C):
            at = (b, slice(first, min(first + C, end)))
            q_, k_, v_ = (x[at].transpose(0, 1) for x in (q, k, v))
            G, b_ = g[at].cumsum(0).T, beta[at].T[..., None]
            T = G.shape[1]
            between = (G[:, :, None] - G[:, None]).tril().exp().tril()
            L = (b_ * between * (k_ @ k_.mT)).tril(-1)
            A = torch.linalg.inv(torch.eye(T) + L)
            write = A @ (b_ * (v_ - G.exp()[..., None] * (k_ @ S)))
            write.retain_grad()
            h.append(S)
            scores = q_ @ k_.mT * between
            out = (G.exp()[..., None] * (q_ @ S) + scores @ write) * q.shape[-1] ** -0.5
            to_end = (G[:, -1:] - G).exp()[..., None]
            S = G[:, -1].exp()[:, None, None] * S + (to_end * k_).mT @ write
            S.retain_grad()
            ends.append(S)
            o = o.index_put((torch.tensor(b), torch.arange(first, first + T)), out.transpose(0, 1))
            with torch.no_grad():
                g_sum[at], solved[(*at, slice(None), slice(T))] = G.T, A.transpose(0, 1)
                u[at] = write.transpose(0, 1)
            writes.append((at, write))
        final.append(S)
    return o, torch.stack(final), (g_sum, solved, u, h, ends, writes)


@pytest.mark.parametrize(
    "K, V, lengths, decay",
    [
        (96, 192, (70,), True),
        (32, 64, (65, 65), False),
        (64, 64, [1, 0, 64, 65], True),  # packed into one row
    ],
    ids=["default head dims", "without decay", "packed"],
)
def test_input_gradients(K, V, lengths, decay):
    torch.manual_seed(0)
    packed = isinstance(lengths, list)
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    offsets = list(itertools.accumulate(lengths, initial=0))
    if packed:
        documents = [(0, start, end) for start, end in itertools.pairwise(offsets)]
    else:
        documents = [(b, 0, T) for b in range(B)]
    q, k = (F.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
    v = torch.randn(B, T, H, V)
    g = -torch.rand(B, T, H) if decay else torch.zeros(B, T, H)
    inputs = [q, k, v, g, 2 * torch.rand(B, T, H), torch.randn(len(documents), H, K, V)]
    inputs = [x.requires_grad_() for x in inputs]
    do, dfinal = torch.randn_like(v), torch.randn_like(inputs[-1])

    cu_seqlens = torch.tensor(offsets, dtype=torch.int32) if packed else None
    *exact, state = [x.detach().requires_grad_() for x in inputs]
    results = gated_delta_rule(*exact, state=state, cu_seqlens=cu_seqlens, impl="naive")
    want = torch.autograd.grad(results, exact, (do, dfinal))

    o, final, (g_sum, solved, u, h, ends, writes) = chunk_form(*inputs, documents)
    assert_same(o, results[0], FP32_GRAD, "o")
    torch.autograd.backward((o, final), (do, dfinal))
    du = torch.zeros_like(v)
    for at, write in writes:
        du[at] = write.grad.transpose(0, 1)
    chunks = [(n, i) for n, length in enumerate(lengths) for i in range(-(-length // C))]
    got = input_gradients(
        q.detach(),
        k.detach(),
        v.detach(),
        g_sum / math.log(2) if decay else None,
        inputs[4].detach(),
        solved,
        u,
        torch.stack(h).detach(),
        do,
        torch.stack([S.grad for S in ends]),
        du,
        scale=K**-0.5,
        cu_seqlens=cu_seqlens,
        chunk_indices=torch.tensor(chunks, dtype=torch.int32) if packed else None,
    )
    for name, a, b in zip(("q", "k", "v", "g", "beta"), got, want, strict=True):
        if a is not None:
            assert_same(a, b, FP32_GRAD, f"gradient of {name}")
    assert decay == (got[3] is not None)
