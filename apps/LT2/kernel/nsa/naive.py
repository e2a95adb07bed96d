"""The definition of native sparse attention: dense scores of one sequence at a time, in fp32.

Shapes: B rows, T queries, S keys (the queries are the last T of S tokens), G key/value heads, R
query heads for each of them, K head dim, C complete blocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from apps.LT2.kernel.nsa.blocks import wide


def nsa_naive(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    gates_BTH3: Tensor,
    *,
    block_size: int,
    n_blocks: int,
    window_size: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Run `native_sparse_attention` in fp32, or in fp64 for fp64 inputs."""
    sizes = (block_size, n_blocks, window_size)
    q, k, v, gates = (wide(x) for x in (q_BTHK, k_BSGK, v_BSGK, gates_BTH3))
    if cu_seqlens is None:
        rows = [one_sequence(q[b], k[b], v[b], gates[b], *sizes) for b in range(len(q))]
        return torch.stack(rows).type_as(q_BTHK)
    spans = [slice(*pair) for pair in pairwise(cu_seqlens.tolist())]
    documents = [
        one_sequence(q[0, span], k[0, span], v[0, span], gates[0, span], *sizes)
        for span in spans
        if span.start < span.stop
    ]
    return torch.cat(documents)[None].type_as(q_BTHK)


def one_sequence(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    gates_TH3: Tensor,
    block_size: int,
    n_blocks: int,
    window_size: int,
) -> Tensor:
    """Return the gated sum of the three branches, (T, H, K)."""
    q_TGRK = q_THK.unflatten(1, (k_SGK.shape[1], -1))
    compressed, importance_TGC = compressed_attention(q_TGRK, k_SGK, v_SGK, block_size)
    chosen = chosen_blocks(importance_TGC, len(k_SGK), block_size, n_blocks)
    selected = selected_attention(q_TGRK, k_SGK, v_SGK, chosen, block_size)
    distance_TS = _tokens(q_TGRK, k_SGK)[:, None] - torch.arange(len(k_SGK), device=q_THK.device)
    in_window_TS = (distance_TS >= 0) & (distance_TS < window_size)
    window, _ = _attend(q_TGRK, k_SGK, v_SGK, in_window_TS[:, None])
    branches_TH3K = torch.stack([compressed, selected, window], dim=-2).flatten(1, 2)
    return (branches_TH3K * gates_TH3[..., None]).sum(-2)


def compressed_attention(
    q_TGRK: Tensor, k_SGK: Tensor, v_SGK: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Attend to the mean keys and values of the blocks that are complete at the query.

    Returns o (T, G, R, K), zero without such blocks, and block weights summed over R, (T, G, C).
    """
    n_complete = len(k_SGK) // block_size
    k_CGK, v_CGK = (
        x[: n_complete * block_size].unflatten(0, (n_complete, block_size)).mean(1)
        for x in (k_SGK, v_SGK)
    )
    last_C = (torch.arange(n_complete, device=k_SGK.device) + 1) * block_size - 1
    seen_TC = last_C <= _tokens(q_TGRK, k_SGK)[:, None]
    o_TGRK, weights_TGRC = _attend(q_TGRK, k_CGK, v_CGK, seen_TC[:, None])
    return o_TGRK, weights_TGRC.sum(2)


def chosen_blocks(
    importance_TGC: Tensor, n_tokens: int, block_size: int, n_blocks: int
) -> list[list[list[int]]]:
    """Return the blocks that each query attends to, for each key/value head.

    First the first block, the query's own and the one before it; then the most important ones.
    """
    n_past = n_tokens - len(importance_TGC)
    chosen = []
    for t, heads in enumerate(importance_TGC.tolist()):
        own = (n_past + t) // block_size
        forced = sorted({0, max(own - 1, 0), own})
        chosen.append([])
        for importance in heads:
            others = sorted(range(1, own - 1), key=lambda block: -importance[block])  # noqa: B023
            chosen[-1].append(forced + others[: n_blocks - len(forced)])
    return chosen


def selected_attention(
    q_TGRK: Tensor, k_SGK: Tensor, v_SGK: Tensor, chosen: list[list[list[int]]], block_size: int
) -> Tensor:
    """Attend to the tokens of the chosen blocks, up to the query itself: (T, G, R, K)."""
    T, G, S = len(q_TGRK), k_SGK.shape[1], len(k_SGK)
    n_past = S - T
    visible_TGS = torch.zeros(T, G, S, dtype=torch.bool)
    for t in range(T):
        for g in range(G):
            for block in chosen[t][g]:
                start = block * block_size
                visible_TGS[t, g, start : min(start + block_size, n_past + t + 1)] = True
    return _attend(q_TGRK, k_SGK, v_SGK, visible_TGS.to(q_TGRK.device))[0]


def _tokens(q_TGRK: Tensor, k_SGK: Tensor) -> Tensor:
    return torch.arange(len(k_SGK) - len(q_TGRK), len(k_SGK), device=q_TGRK.device)


def _attend(
    q_TGRK: Tensor, k_SGK: Tensor, v_SGK: Tensor, visible_TGS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(K)) v and its softmax (T, G, R, S); zero if none is visible."""
    hidden_TG1S = ~visible_TGS[:, :, None]
    scores = torch.einsum("tgrk,sgk->tgrs", q_TGRK, k_SGK) * q_TGRK.shape[-1] ** -0.5
    nothing = hidden_TG1S.all(-1, keepdim=True)
    weights = scores.masked_fill(hidden_TG1S & ~nothing, -torch.inf).softmax(-1)
    weights = weights.masked_fill(hidden_TG1S, 0)
    return torch.einsum("tgrs,sgk->tgrk", weights, v_SGK), weights
