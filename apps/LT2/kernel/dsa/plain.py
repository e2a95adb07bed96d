"""Attention over selected keys in plain torch, one block of queries at a time.

Matrix products multiply in the inputs' dtype and sum in fp32; softmax is fp32 (fp64 for fp64
inputs). Shapes as in `dsa`; N = B G; R = H / G query heads share a key head; Q queries in a block;
M = R Q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype
from apps.LT2.kernel.dsa.blocks import Block, query_blocks
from apps.LT2.kernel.dsa.selection import unpack_bits, wide_bmm


class PlainAttention:
    """The outputs of all queries, computed block by block."""

    def __init__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor):
        self.n_batch, self.wide = q_BTHK.shape[0], wide_dtype(q_BTHK.dtype)
        self.q_NRTK = _grouped(q_BTHK, k_BSGK.shape[2])
        self.k_NSK, self.v_NSK = _by_head(k_BSGK), _by_head(v_BSGK)
        self.o_NRTK = torch.empty_like(self.q_NRTK)

    def attend(self, block: Block, selected_BQS: Tensor, *, with_mean: bool) -> Tensor | None:
        """Compute a block's outputs. Returns the mean of the heads' probabilities, (B, Q, S)."""
        queries, keys = block.queries, block.keys
        bias_BQS = _bias(selected_BQS, self.wide)
        k_NSK, v_NSK = self.k_NSK[:, keys], self.v_NSK[:, keys]
        p_BHQS = _probabilities(self.q_NRTK[:, :, queries], k_NSK, bias_BQS, self.n_batch)
        o_NMK = _combine(p_BHQS, v_NSK)
        self.o_NRTK[:, :, queries] = o_NMK.unflatten(1, (self.q_NRTK.shape[1], -1))
        return p_BHQS.mean(1) if with_mean else None

    def results(self) -> tuple[Tensor, Tensor]:
        """Return o, and an empty log-sum-exp: only the kernels' backward needs one."""
        o_BTHK = _by_token(self.o_NRTK, self.n_batch)
        return o_BTHK, o_BTHK.new_empty(0, dtype=torch.float32)


def backward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    bits_BTX: Tensor,
    cu_seqlens: Tensor | None,
    do_BTHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, with probabilities recomputed from the selection."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    wide, scale = wide_dtype(q_BTHK.dtype), K**-0.5
    q_NRTK, do_NRTK = _grouped(q_BTHK, G), _grouped(do_BTHK, G)
    k_NSK, v_NSK = _by_head(k_BSGK), _by_head(v_BSGK)
    dq_NRTK = torch.empty_like(q_NRTK)
    dk_NSK, dv_NSK = (torch.zeros_like(x, dtype=wide) for x in (k_NSK, v_NSK))
    for block in query_blocks(T, S, cu_seqlens, elements_per_pair=B * H, device=q_BTHK.device):
        queries, keys = block.queries, block.keys
        selected = block.visible[None]
        if bits_BTX.numel():
            selected = unpack_bits(bits_BTX[:, queries, block.first // 8 :], block.n_keys)
        q_NMK, do_NMK = (x[:, :, queries].flatten(1, 2) for x in (q_NRTK, do_NRTK))  # M = R Q
        bias_BQS = _bias(selected, wide)
        p_BHQS = _probabilities(q_NRTK[:, :, queries], k_NSK[:, keys], bias_BQS, B)
        p_NMS = p_BHQS.view(*q_NMK.shape[:2], -1)
        dv_NSK[:, keys] += wide_bmm(p_NMS.to(q_NMK.dtype).transpose(1, 2), do_NMK)
        dp_NMS = wide_bmm(do_NMK, v_NSK[:, keys].transpose(1, 2))
        ds_NMS = torch.ops.aten._softmax_backward_data(dp_NMS, p_NMS, -1, wide)
        del dp_NMS, p_NMS, p_BHQS
        ds_NMS = ds_NMS.mul_(scale).to(q_NMK.dtype)
        dk_NSK[:, keys] += wide_bmm(ds_NMS.transpose(1, 2), q_NMK)
        dq_NMK = wide_bmm(ds_NMS, k_NSK[:, keys])
        dq_NRTK[:, :, queries] = dq_NMK.view_as(dq_NRTK[:, :, queries])
    dk, dv = (x.unflatten(0, (B, G)).transpose(1, 2).to(q_BTHK.dtype) for x in (dk_NSK, dv_NSK))
    return _by_token(dq_NRTK, B), dk.contiguous(), dv.contiguous()


def _by_head(x_BSGK: Tensor) -> Tensor:
    """Return N = B G matrices for batched products, (N, S, K)."""
    return x_BSGK.transpose(1, 2).flatten(0, 1).contiguous()


def _grouped(q_BTHK: Tensor, n_kv_heads: int) -> Tensor:
    """Group the queries of each key head: (N, R, T, K)."""
    return q_BTHK.unflatten(2, (n_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _by_token(o_NRTK: Tensor, n_batch: int) -> Tensor:
    """Undo `_grouped`: (B, T, H, K)."""
    o_BTGRK = o_NRTK.unflatten(0, (n_batch, -1)).permute(0, 3, 1, 2, 4)
    return o_BTGRK.flatten(2, 3).contiguous()


def _bias(selected_BQS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 for selected keys and -inf for others."""
    zeros = torch.zeros(selected_BQS.shape, dtype=dtype, device=selected_BQS.device)
    return zeros.masked_fill_(~selected_BQS, float("-inf"))


def _probabilities(q_NRQK: Tensor, k_NSK: Tensor, bias_BQS: Tensor, n_batch: int) -> Tensor:
    """Return softmax(q k^T / sqrt(K) + bias), (B, H, Q, S)."""
    n_queries, head_dim = q_NRQK.shape[2:]
    logits_NMS = wide_bmm(q_NRQK.flatten(1, 2), k_NSK.transpose(1, 2))
    logits_BHQS = logits_NMS.view(n_batch, -1, n_queries, k_NSK.shape[1])
    torch.add(bias_BQS[:, None], logits_BHQS, alpha=head_dim**-0.5, out=logits_BHQS)
    return logits_BHQS.softmax(-1)


def _combine(p_BHQS: Tensor, v_NSK: Tensor) -> Tensor:
    """Return p v, (N, R Q, K)."""
    p_NMS = p_BHQS.view(v_NSK.shape[0], -1, v_NSK.shape[1])
    return wide_bmm(p_NMS.to(v_NSK.dtype), v_NSK)
