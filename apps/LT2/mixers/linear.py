"""What linear mixers share: projections, a short convolution, a recurrence, and their memory.

    streams, rest = project(x)            one matrix product of all `projections`
    streams = silu(conv(streams))         where the mixer has a convolution
    o, state = recurrence(inputs(streams, rest))      the mixer's own
    y = output(o, rest)                   norm, gate, output projection

Shapes: B sequences, T tokens, D model width, C channels of the streams, H heads, K key width,
V value width, N sequences of a packed call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.documents import local_positions
from apps.LT2.mixers.base import (
    Extension,
    Mixer,
    MixerArgs,
    MixerCache,
    cache_positions,
    cache_rows,
)
from apps.LT2.mixers.parts import ShortConv
from lingua.errors import UserError
from lingua.parallel.tensor_parallel import TensorParallel, local_weight
from lingua.probe import is_probing
from lingua.transformer import check_sizes, fused_weight

# With fewer tokens a product is bound by reading weights, and joining them reads them twice.
FUSE_TOKENS = 512

Rest = tuple[Tensor, ...]


@dataclass
class LinearCache(MixerCache):
    state_BHKV: Tensor  # fp32: it sums over the whole past
    tail_BTC: Tensor | None  # the last conv_size - 1 inputs of the convolution
    length_B: Tensor | None  # int64, tokens seen; only where a mixer uses positions


class LinearMixer(Mixer):
    """A mixer whose past is one matrix a head, of the same size at any length.

    A subclass sets the four attributes and `conv` (None: the streams are not convolved), and gives
    `projections`, `inputs`, `recurrence`, `recurrence_step`, `output` and `recurrence_flops`.
    """

    uses_positions: ClassVar[bool] = False
    by_inputs = ("wo",)

    key_dim: int
    value_dim: int
    conv: ShortConv | None

    @abstractmethod
    def projections(self) -> tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...]]:
        """The linears that read the layer's input: those of the streams, in their order, and the
        others."""

    def project(self, x: Tensor) -> tuple[Tensor, Rest]:
        """(streams (..., C), rest) of x (..., D): what is convolved, and what is not."""
        return project_streams(x, *self.projections())

    def fused_linears(self) -> tuple[nn.Linear, ...]:
        streams, rest = self.projections()
        return (*streams, *rest)

    @abstractmethod
    def inputs(self, streams: Tensor, rest: Rest, positions: Tensor | None) -> tuple[Tensor, ...]:
        """What the recurrence takes: q, k, v by head and what else it has.

        streams and rest have shapes (B, T, ...), or (B, ...) in a step; positions, where
        `uses_positions`, (T,) or (B, T), or (B,) in a step.
        """

    @abstractmethod
    def recurrence(
        self, *inputs: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """o (B, T, H, V) and the fp32 state (N, H, K, V) after the last token; `state` is the one
        before the first, zeros if None."""

    @abstractmethod
    def recurrence_step(self, *inputs: Tensor, state_BHKV: Tensor) -> Tensor:
        """One token a row: o (B, H, V); the state is moved on in place."""

    @abstractmethod
    def output(self, o: Tensor, rest: Rest) -> Tensor:
        """(..., D) from o (..., H, V)."""

    @abstractmethod
    def recurrence_flops(self) -> int:
        """FLOPs of the recurrence per token, all heads."""

    def split_counts(self) -> dict[str, int]:
        return {f"the heads (model.{self.module_name}.n_heads or model.n_heads)": self.n_heads}

    def stream_widths(self) -> list[tuple[int, bool]]:
        """(channels, whether heads share them out) of what the streams hold side by side."""
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        return [(keys, True), (keys, True), (values, True)]

    def split(self, tp: TensorParallel) -> None:
        if self.conv is not None:
            self.conv.split(tp, self.stream_widths())
        super().split(tp)

    def recur(
        self,
        streams: Tensor,
        rest: Rest,
        *,
        positions: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = self.inputs(streams, rest, positions)
        return self.recurrence(*inputs, state=state, cu_seqlens=cu_seqlens)

    def recur_step(
        self, streams: Tensor, rest: Rest, *, positions: Tensor | None, state_BHKV: Tensor
    ) -> Tensor:
        return self.recurrence_step(*self.inputs(streams, rest, positions), state_BHKV=state_BHKV)

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        assert window is None, f"{type(self).__name__} has no window"
        streams, rest = self.project(x_BTD)
        if self.conv is not None:
            streams = self.conv(streams, cu_seqlens=cu_seqlens)
        positions = None
        if self.uses_positions:
            positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        o, _ = self.recur(streams, rest, positions=positions, state=None, cu_seqlens=cu_seqlens)
        return self.output(o, rest)

    def init_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> LinearCache:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        conv = self.conv
        return LinearCache(
            zeros(self.n_heads, self.key_dim, self.value_dim, dtype=torch.float32),
            None if conv is None else zeros(conv.n_tail, conv.channels, dtype=dtype),
            zeros(dtype=torch.int64) if self.uses_positions else None,
        )

    def prefill(
        self,
        x_BTD: Tensor,
        cache: LinearCache,
        *,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
        window: int | None = None,
        past: Sequence[Extension] | None = None,
    ) -> Tensor:
        rows, lengths = cache_rows(x_BTD, cu_seqlens, rows)
        streams, rest = self.project(x_BTD)
        if self.conv is not None:
            assert cache.tail_BTC is not None
            tail, inputs = cache.tail_BTC[rows], streams
            streams = self.conv(inputs, tail=tail, cu_seqlens=cu_seqlens)
            next_tail = self.conv.next_tail(inputs, tail=tail, cu_seqlens=cu_seqlens)
            cache.tail_BTC[rows] = next_tail.to(tail.dtype)
        positions = None
        if cache.length_B is not None:
            positions = cache_positions(x_BTD, cu_seqlens, cache.length_B[rows])
            cache.length_B[rows] += lengths
        state = cache.state_BHKV[rows]
        o, state = self.recur(
            streams, rest, positions=positions, state=state, cu_seqlens=cu_seqlens
        )
        cache.state_BHKV[rows] = state
        return self.output(o, rest)

    def step(self, x_B1D: Tensor, cache: LinearCache) -> Tensor:
        streams, rest = self.project(x_B1D[:, 0])
        if self.conv is not None:
            assert cache.tail_BTC is not None
            streams = self.conv.step(streams, cache.tail_BTC)
        o = self.recur_step(streams, rest, positions=cache.length_B, state_BHKV=cache.state_BHKV)
        if cache.length_B is not None:
            cache.length_B += 1
        return self.output(o, rest)[:, None]

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        products = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        taps = 0 if self.conv is None else 2 * self.conv.channels * self.conv.size
        return products + taps + self.recurrence_flops()

    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        tail = 0 if self.conv is None else self.conv.n_tail * self.conv.channels * dtype.itemsize
        return 4 * self.n_heads * self.key_dim * self.value_dim + tail

    def step_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        return 2 * self.state_bytes(seqlen, dtype, window)  # read, and written anew

    def split_heads(self, x: Tensor, width: int) -> Tensor:
        """(..., H * width) -> (..., H, width)"""
        return x.unflatten(-1, (self.n_heads, width))


class HeadOptions(Protocol):
    """The options of a linear mixer's heads, in its section of `model:`."""

    n_heads: int | None
    head_dim: int | None
    expand_v: float


def head_shape(
    shared: MixerArgs, own: HeadOptions, name: str, key_share: float = 1
) -> tuple[int, int, int]:
    """Return (heads, key dim, value dim) of the section `name`, such as "model.gdn".

    By default there are model.n_heads heads, whose keys take `key_share` of model.dim. UserError
    unless all three are whole numbers.
    """
    check_sizes("model", shared, "n_heads")
    check_sizes(name, own, "n_heads", "head_dim")
    n_heads = own.n_heads or shared.n_heads
    if n_heads is None:
        raise UserError(f"{name}.n_heads and model.n_heads are both null: set one, e.g. 8")
    key_dim = own.head_dim or key_share * shared.dim / n_heads
    if key_dim != int(key_dim):
        share = "" if key_share == 1 else f"{key_share:g} * "
        raise UserError(
            f"{name}.head_dim: {share}dim / n_heads = {share}{shared.dim} / {n_heads} is no whole "
            f"number; set {name}.head_dim"
        )
    key_dim = int(key_dim)
    value_dim = key_dim * own.expand_v
    if value_dim < 1 or value_dim != int(value_dim):
        raise UserError(
            f"{name}.expand_v={own.expand_v} times the key width {key_dim} is no whole number; "
            "use 1, 1.5 or 2"
        )
    return n_heads, key_dim, int(value_dim)


def split_qkv(
    streams: Tensor, n_heads: int, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (..., H, K) and v (..., H, V) of streams (..., H (2 K + V)) that hold q, then k, v."""
    keys = n_heads * key_dim
    q, k, v = streams.split([keys, keys, n_heads * value_dim], dim=-1)
    return (
        q.unflatten(-1, (n_heads, key_dim)),
        k.unflatten(-1, (n_heads, key_dim)),
        v.unflatten(-1, (n_heads, value_dim)),
    )


def project_streams(
    x: Tensor, streams: Sequence[nn.Linear], rest: Sequence[nn.Linear]
) -> tuple[Tensor, Rest]:
    """The projections of x (..., D): those of `streams` side by side, those of `rest` apart.

    All are bias-free, and one matrix product where their weights are joined or x has many tokens.
    """
    linears = (*streams, *rest)
    weight = None if is_probing() else fused_weight(linears)
    if weight is None and (x.shape[:-1].numel() < FUSE_TOKENS or is_probing()):
        outputs = [linear(x) for linear in linears]
        return torch.cat(outputs[: len(streams)], dim=-1), tuple(outputs[len(streams) :])
    if weight is None:
        weight = torch.cat([local_weight(linear) for linear in linears])
    widths = [sum(linear.out_features for linear in streams)]
    widths += [linear.out_features for linear in rest]
    first, *others = F.linear(x, weight).split(widths, dim=-1)
    return first, tuple(others)
