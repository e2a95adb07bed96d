"""The gated delta rule chunk by chunk, in plain torch: what trains on CPU.

Inside a chunk the writes depend on each other only through a unit triangular system, so they are
solved for at once (the WY form of https://arxiv.org/abs/2412.06464); between chunks only the state
passes. README.md derives the formulas below.

Shapes: M chunks of all sequences together, H heads, C tokens in a chunk, K key and V value width,
N sequences. Chunks are numbered step-major: the first chunk of every sequence (longest sequence
first), then the second chunk of those that have one, and so on. So one step of the state
recurrence serves all sequences at once and reads a contiguous slice, and one long document among
many short ones costs no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # as in fla's kernels: work inside a chunk grows with C, steps between chunks with 1/C


def gated_delta_rule_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `gated_delta_rule`; fp64 inputs are computed in fp64."""
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    B, T, H, K = q_BTHK.shape
    layout = _dense_layout(B, T) if cu_seqlens is None else _packed_layout(cu_seqlens)

    q_MHCK = layout.to_chunks(q_BTHK).to(dtype) * K**-0.5
    k_MHCK = layout.to_chunks(k_BTHK).to(dtype)
    v_MHCV = layout.to_chunks(v_BTHV).to(dtype)
    g_MHC = layout.to_chunks(g_BTH[..., None])[..., 0]
    beta_MHC1 = layout.to_chunks(beta_BTH[..., None]).to(dtype)

    decay = _Decay.of(g_MHC, dtype)
    kk_MHCC = k_MHCK @ k_MHCK.mT
    # The solver reads the strict lower triangle only: the diagonal counts as ones.
    system_MHCC = kk_MHCC * decay.between_MHCC * beta_MHC1
    rhs = torch.cat([v_MHCV, k_MHCK * decay.from_start_MHC1], dim=-1) * beta_MHC1
    solved = torch.linalg.solve_triangular(system_MHCC, rhs, upper=False, unitriangular=True)
    u_MHCV, w_MHCK = solved.split([v_MHCV.shape[-1], K], dim=-1)

    k_to_end_MHKC = (k_MHCK * decay.to_end_MHC1).mT
    starts_MHKV, final_NHKV = _pass_state(
        layout,
        keep=decay.whole_MH11,
        erase=k_to_end_MHKC @ w_MHCK,
        write=k_to_end_MHKC @ u_MHCV,
        state=layout.sort_sequences(_initial_state(state, layout.n_sequences, v_MHCV, K)),
    )
    writes_MHCV = u_MHCV - w_MHCK @ starts_MHKV
    qk_MHCC = (q_MHCK @ k_MHCK.mT) * decay.between_MHCC
    o_MHCV = (q_MHCK * decay.from_start_MHC1) @ starts_MHKV + qk_MHCC @ writes_MHCV
    return layout.from_chunks(o_MHCV, B, T).to(v_BTHV.dtype), layout.unsort_sequences(final_NHKV)


@dataclass
class _Decay:
    """How much of what was written is left, for the spans of a chunk that are needed."""

    between_MHCC: Tensor  # after token j, up to and with token i; 0 for j > i
    from_start_MHC1: Tensor  # from the start of the chunk, up to and with token i
    to_end_MHC1: Tensor  # after token j, up to the end of the chunk
    whole_MH11: Tensor  # over the whole chunk

    @staticmethod
    def of(g_MHC: Tensor, dtype: torch.dtype) -> _Decay:
        # Summed in fp64: after strong decay the sums are large and their differences small.
        sum_MHC = g_MHC.double().cumsum(-1)
        C = g_MHC.shape[-1]
        later = torch.ones(C, C, dtype=torch.bool, device=g_MHC.device).triu(1)
        # Masked before exp: above the diagonal the difference is positive and exp could overflow,
        # and inf * 0 would turn the gradient into NaN.
        between = (sum_MHC[..., :, None] - sum_MHC[..., None, :]).to(dtype)
        return _Decay(
            between_MHCC=between.masked_fill(later, -torch.inf).exp(),
            from_start_MHC1=sum_MHC.to(dtype).exp()[..., None],
            to_end_MHC1=(sum_MHC[..., -1:] - sum_MHC).to(dtype).exp()[..., None],
            whole_MH11=sum_MHC[..., -1].to(dtype).exp()[..., None, None],
        )


def _initial_state(state: Tensor | None, n: int, v_MHCV: Tensor, K: int) -> Tensor:
    if state is None:
        return v_MHCV.new_zeros(n, v_MHCV.shape[1], K, v_MHCV.shape[-1])
    return state.to(v_MHCV.dtype)


def _pass_state(
    layout: _Layout, *, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S <- keep S - erase S + write, chunk after chunk: S at each chunk's start, and at the end."""
    starts, ended = [], []
    first = 0
    for n_running in layout.n_running:
        ended.append(state[n_running:])  # sequences without another chunk are the last rows
        state = state[:n_running]
        starts.append(state)
        chunk = slice(first, first + n_running)
        state = keep[chunk] * state + write[chunk] - erase[chunk] @ state
        first += n_running
    return torch.cat(starts), torch.cat([state, *reversed(ended)])


@dataclass
class _Layout:
    """Where each token goes, in chunks that are numbered step-major. Unfilled slots hold zeros,
    and a token of zeros neither decays, writes nor reads."""

    chunk: int  # tokens in a chunk
    n_running: list[int]  # sequences that have a chunk at step 0, 1, ..
    slot_T: Tensor | None = (
        None  # slot of each packed token; None: dense, slots follow from the shape
    )
    order_N: Tensor | None = None  # packed: sequences, longest first

    @property
    def n_sequences(self) -> int:
        return self.n_running[0] if self.order_N is None else len(self.order_N)

    def to_chunks(self, x_BTHD: Tensor) -> Tensor:
        B, T, H, D = x_BTHD.shape
        if self.slot_T is None:
            steps = len(self.n_running)
            x = F.pad(x_BTHD, (0, 0, 0, 0, 0, steps * self.chunk - T))
            return x.view(B, steps, self.chunk, H, D).permute(1, 0, 3, 2, 4).flatten(0, 1)
        slots = x_BTHD.new_zeros(sum(self.n_running) * self.chunk, H, D)
        x = slots.index_copy(0, self.slot_T, x_BTHD[0])
        return x.view(-1, self.chunk, H, D).transpose(1, 2)

    def from_chunks(self, o_MHCV: Tensor, B: int, T: int) -> Tensor:
        _, H, C, V = o_MHCV.shape
        if self.slot_T is None:
            o = o_MHCV.view(len(self.n_running), B, H, C, V).permute(1, 0, 3, 2, 4)
            return o.reshape(B, -1, H, V)[:, :T]
        return o_MHCV.transpose(1, 2).reshape(-1, H, V)[self.slot_T][None]

    def sort_sequences(self, state_NHKV: Tensor) -> Tensor:
        return state_NHKV if self.order_N is None else state_NHKV[self.order_N]

    def unsort_sequences(self, state_NHKV: Tensor) -> Tensor:
        return state_NHKV if self.order_N is None else state_NHKV[self.order_N.argsort()]


def _dense_layout(B: int, T: int) -> _Layout:
    chunk = min(CHUNK, T)
    return _Layout(chunk, [B] * -(-T // chunk))


def _packed_layout(cu_seqlens: Tensor) -> _Layout:
    bounds_N = cu_seqlens.long().cpu()
    length_N = bounds_N.diff()
    chunk = min(CHUNK, int(length_N.max()))
    chunks_N = (length_N + chunk - 1) // chunk
    order_N = chunks_N.argsort(descending=True, stable=True)
    n_running = [int((chunks_N > step).sum()) for step in range(int(chunks_N.max()))]

    first_chunk_of_step = torch.tensor([0, *n_running]).cumsum(0)
    rank_N = order_N.argsort()
    sequence_T = torch.repeat_interleave(length_N)
    position_T = torch.arange(len(sequence_T)) - bounds_N[sequence_T]
    chunk_T = first_chunk_of_step[position_T // chunk] + rank_N[sequence_T]
    slot_T = chunk_T * chunk + position_T % chunk
    device = cu_seqlens.device
    return _Layout(chunk, n_running, slot_T.to(device), order_N.to(device))
