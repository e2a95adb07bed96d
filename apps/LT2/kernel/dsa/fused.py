"""DeepSeek sparse attention and the indexer's loss on Triton kernels, in blocks of queries.

As `blocked.py`, but a block has one matrix of queries by keys: its scores, later overwritten by the
loss's gradient. Shapes as in `dsa`; S is T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.dsa.blocked import Forward
from apps.LT2.kernel.dsa.blocks import query_ranges
from apps.LT2.kernel.dsa.selection import Index, mask_bytes
from apps.LT2.kernel.dsa.triton import Documents, KernelAttention
from apps.LT2.kernel.dsa.triton_index import KernelIndexer


def forward(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    index: Index,
    cu_seqlens: Tensor | None,
    top_k: int,
    *,
    with_loss: bool,
) -> Forward:
    B, T = q_BTHK.shape[:2]
    bits_BTX = q_BTHK.new_zeros(B, T, mask_bytes(T), dtype=torch.uint8)
    documents = Documents.of(cu_seqlens, T, q_BTHK.device)
    attention = KernelAttention(q_BTHK, k_BTGK, v_BTGK, bits_BTX, documents)
    indexer = KernelIndexer(index, attention, top_k, with_loss=with_loss)
    for begin, end in query_ranges(T, elements_per_query=B * T):
        scores_BQS, log_sum_BQ = indexer.choose(begin, end)
        attention.attend(begin, end)
        if with_loss:
            indexer.compare(scores_BQS, log_sum_BQ, begin, end)
            indexer.differentiate(scores_BQS, begin, end)
    loss, grads = indexer.results()
    return Forward(attention.o_BTHK, attention.lse_BHT, bits_BTX, loss, grads)
