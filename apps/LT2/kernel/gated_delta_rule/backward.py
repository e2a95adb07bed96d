"""The backward pass of the delta rules on Hopper: fla's recurrent kernels, and one of our own.

The last step of the backward pass computes the gradients of the inputs, all chunks at once. fla
does it in two kernels: the first spills registers, and the second reads most of its tiles again.
Here one program computes one chunk of one head. It reads every tile once from global memory, keeps
those of V in shared memory, and loops over narrow tiles of K, so K = 96 needs no padding.
README.md derives the formulas.

Shapes: B sequences, T tokens, H heads, K key and V value head dim, C tokens in a chunk.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.fla import Packed, import_fla
from apps.LT2.kernel.triton_jit import jit, tl

CONFIG = {"BLOCK_K": 32, "BLOCK_V": 64, "num_warps": 4, "num_stages": 1}
MAX_VALUE_DIM = 256  # three rows of V per token in shared memory

logger = logging.getLogger(__name__)


def kernel_supports(k: Tensor, v: Tensor) -> bool:
    """Return whether our kernel supports the GPU and head dims; if not, warn once."""
    return k.is_cuda and _supports(k.device, k.shape[-1], v.shape[-1])


@cache
def _supports(device: torch.device, K: int, V: int) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    fits = K % CONFIG["BLOCK_K"] == 0 and V % CONFIG["BLOCK_V"] == 0 and V <= MAX_VALUE_DIM
    if major == 9 and fits:
        return True
    logger.warning(
        f"The backward of the delta rules uses fla's slower kernels. Ours need compute capability "
        f"9.x, a key dim that is a multiple of {CONFIG['BLOCK_K']}, and a value dim that is a "
        f"multiple of {CONFIG['BLOCK_V']} up to {MAX_VALUE_DIM}; got {major}.{minor}, {K} and {V}."
    )
    return False


def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_sum: Tensor | None,
    beta: Tensor,
    solved: Tensor,
    packed: Packed,
    *,
    scale: float,
    initial_state: Tensor | None,
    do: Tensor,
    dht: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, g, beta and the initial state.

    Arguments are those of `ChunkOperator`; `solved` are the inverses that forward keeps.
    """
    states = import_fla("fla.ops.common.chunk_delta_h")
    chunks: dict[str, Any] = {"g": g_sum, "chunk_size": chunk_size, **packed}
    w, u = import_fla("fla.ops.gated_delta_rule.wy_fast").recompute_w_u_fwd(
        k=k, v=v, beta=beta, A=solved, g=g_sum, **packed
    )
    h, u, _ = states.chunk_gated_delta_rule_fwd_h(
        k=k, w=w, u=u, initial_state=initial_state, output_final_state=False, **chunks
    )
    du = import_fla("fla.ops.common.chunk_o").chunk_bwd_dv_local(
        q=q, k=k, do=do, scale=scale, **chunks
    )
    dh, dstate, du = states.chunk_gated_delta_rule_bwd_dhu(
        q=q, k=k, w=w, h0=initial_state, dht=dht, do=do, dv=du, scale=scale, **chunks
    )
    grads = input_gradients(q, k, v, g_sum, beta, solved, u, h, do, dh, du, scale=scale, **packed)
    return *grads, dstate


def input_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_sum: Tensor | None,
    beta: Tensor,
    solved: Tensor,
    u: Tensor,
    h: Tensor,
    do: Tensor,
    dh: Tensor,
    du: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of q, k, v, g and beta. All tensors are contiguous.

    q, k    (B, T, H, K)
    v, u    (B, T, H, V)   values, and writes
    do, du  (B, T, H, V)   gradients of the output and of the writes
    g_sum   (B, T, H)      decays summed in each chunk, in base 2, fp32; None without decay
    beta    (B, T, H)      fp32
    solved  (B, T, H, C)   rows of the inverse of I + L
    h, dh   (.., H, K, V)  state before each chunk, and gradient of the state after it
    """
    (B, T, H, K), V, C = k.shape, v.shape[-1], solved.shape[-1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dg = None if g_sum is None else torch.empty_like(g_sum)
    dbeta = torch.empty_like(beta)
    n_chunks = B * -(-T // C) if chunk_indices is None else len(chunk_indices)
    _input_gradients_kernel[(H * n_chunks,)](  # other axes end at 65,535
        *(q, k, v, g_sum, beta, solved, u, h, do, dh, du),
        *(dq, dk, dv, dg, dbeta, cu_seqlens, chunk_indices, scale, T),
        **{"H": H, "K": K, "V": V, "C": C},
        DECAY=g_sum is not None,
        PACKED=cu_seqlens is not None,
        **CONFIG,
    )
    return dq, dk, dv, dg, dbeta


@jit(do_not_specialize=["T"])
def _input_gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    solved_ptr,
    u_ptr,
    h_ptr,
    do_ptr,
    dh_ptr,
    du_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dg_ptr,
    dbeta_ptr,
    cu_seqlens_ptr,
    chunk_indices_ptr,
    scale,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    if PACKED:
        document = tl.load(chunk_indices_ptr + 2 * chunk)
        start = tl.load(cu_seqlens_ptr + document).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + document + 1).to(tl.int64)
        first = start + tl.load(chunk_indices_ptr + 2 * chunk + 1) * C
    else:
        per_row = tl.cdiv(T, C)
        start = chunk // per_row * T
        end = start + T
        first = start + chunk % per_row * C
    at_C = tl.arange(0, C)
    n = tl.minimum(end - first, C).to(tl.int32)  # tokens in this chunk
    in_C = at_C < n
    row = first * H + head
    at_token = at_C * H
    h_ptr += (chunk * H + head) * K * V
    dh_ptr += (chunk * H + head) * K * V
    q_ptr += row * K
    k_ptr += row * K
    dq_ptr += row * K
    dk_ptr += row * K
    v_ptr += row * V
    u_ptr += row * V
    do_ptr += row * V
    du_ptr += row * V
    dv_ptr += row * V
    solved_ptr += row * C
    beta_ptr += row
    dbeta_ptr += row
    if DECAY:
        g_ptr += row
        dg_ptr += row

    beta = tl.load(beta_ptr + at_token, mask=in_C, other=0.0).to(tl.float32)
    solved = tl.load(
        solved_ptr + at_token[:, None] * C + at_C[None, :], mask=in_C[:, None], other=0.0
    )
    solved_T = tl.trans(solved)
    # Tiles of V stay in shared memory.
    us, dos, dus = (), (), ()
    ds = tl.zeros([C, C], tl.float32)  # gradient of the scores of q and k
    dL = tl.zeros([C, C], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    for first_V in tl.static_range(0, V, BLOCK_V):
        at_V = first_V + tl.arange(0, BLOCK_V)
        u = _rows(u_ptr, at_token, in_C, at_V, V)
        do = _rows(do_ptr, at_token, in_C, at_V, V)
        du = _rows(du_ptr, at_token, in_C, at_V, V)
        ds = tl.dot(do, tl.trans(u), ds)
        dx = tl.dot(solved_T, du)
        v = _rows(v_ptr, at_token, in_C, at_V, V)
        dbeta += tl.sum(dx * v, 1)
        _store(dv_ptr, at_token, in_C, at_V, V, dx * beta[:, None])
        dL = tl.dot(dx.to(u.dtype), tl.trans(u), dL)
        us, dos, dus = us + (u,), dos + (do,), dus + (du,)

    decay = tl.full([C], 1.0, tl.float32)  # from the start of the chunk
    to_end = decay
    lower = (at_C[:, None] >= at_C[None, :]) & in_C[:, None]
    between = tl.where(lower, 1.0, 0.0)
    if DECAY:
        g = tl.load(g_ptr + at_token, mask=in_C, other=0.0).to(tl.float32)
        g_end = tl.sum(tl.where(at_C == n - 1, g, 0.0))
        decay = tl.exp2(g)
        to_end = tl.where(in_C, tl.exp2(g_end - g), 0.0)
        between = tl.exp2(tl.where(lower, g[:, None] - g[None, :], float("-inf")))
    ds = (ds * between * scale).to(u.dtype)
    dL = tl.where(at_C[:, None] > at_C[None, :], -dL * between, 0.0).to(u.dtype)

    dg = tl.zeros([C], tl.float32)
    dend = tl.zeros([C], tl.float32)  # gradient of the decay of the whole chunk
    dkeep = tl.zeros([BLOCK_K], tl.float32)
    for first_K in range(0, K, BLOCK_K):
        at_K = first_K + tl.arange(0, BLOCK_K)
        q = _rows(q_ptr, at_token, in_C, at_K, K)
        k = _rows(k_ptr, at_token, in_C, at_K, K)
        dq = tl.zeros([C, BLOCK_K], tl.float32)
        dk = tl.zeros([C, BLOCK_K], tl.float32)
        dw = tl.zeros([C, BLOCK_K], tl.float32)
        for j in tl.static_range(len(us)):
            at_V = j * BLOCK_V + tl.arange(0, BLOCK_V)
            at = at_K[:, None] * V + at_V[None, :]
            h = tl.load(h_ptr + at)
            dh = tl.load(dh_ptr + at)
            dq = tl.dot(dos[j], tl.trans(h), dq)
            dw = tl.dot(dus[j], tl.trans(h), dw)
            dk = tl.dot(us[j], tl.trans(dh), dk)
            dkeep += tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1)
        dq = tl.dot(ds, k, dq * (decay * scale)[:, None])
        _store(dq_ptr, at_token, in_C, at_K, K, dq)
        dk *= to_end[:, None]
        dend += tl.sum(dk * k, 1)
        dk = tl.dot(tl.trans(ds), q, dk)
        dkb = tl.dot(solved_T, dw.to(k.dtype))  # gradient of beta k
        dkb = tl.dot(dL, k, -dkb * decay[:, None])
        dk = tl.dot(tl.trans(dL), (k * beta[:, None]).to(k.dtype), dk) + dkb * beta[:, None]
        _store(dk_ptr, at_token, in_C, at_K, K, dk)
        k_dkb = tl.sum(dkb * k, 1)
        dbeta += k_dkb
        dg += tl.sum(dq * q, 1) - tl.sum(dk * k, 1) + 2 * beta * k_dkb
    tl.store(dbeta_ptr + at_token, dbeta, mask=in_C)
    if DECAY:
        dend = tl.sum(dend) + tl.sum(dkeep) * tl.exp2(g_end)
        dg += tl.where(at_C == n - 1, dend, 0.0)
        # The decay of a token is in the sums up to the end of its chunk.
        dg = tl.sum(tl.where(lower, dg[:, None], 0.0), 0)
        tl.store(dg_ptr + at_token, dg, mask=in_C)


@jit()
def _rows(ptr, at_token, in_C, at, width):
    return tl.load(ptr + at_token[:, None] * width + at[None, :], mask=in_C[:, None], other=0.0)


@jit()
def _store(ptr, at_token, in_C, at, width, x):
    at = at_token[:, None] * width + at[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=in_C[:, None])
