"""Linear mixers: projections, a short convolution, a recurrence, and the cache they share.

    streams, rest = project(x)                    one matrix product of all linears of x
    streams = silu(conv(streams))                 if the mixer has a convolution
    o, state = recurrence(*inputs(streams, rest))
    y = wo(output(o, streams, rest))              norm, gate, output projection

Shapes: B sequences, T tokens, D model dim, C channels of the streams, H heads, K key dim,
V value dim, N sequences of a packed call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.decode_linear import Conv, Norm, decode_linear
from apps.LT2.kernel.documents import local_positions
from apps.LT2.kernel.short_conv.heads import unit_heads
from apps.LT2.kernel.skipped_loops import DeltaUpdate, SkippedLoops
from apps.LT2.mixers.base import Mixer, MixerArgs, MixerCache, Prompts, TensorParallelPlan
from apps.LT2.mixers.parts import ShortConv, decode_weight
from lingua.errors import UserError
from lingua.parallel.tensor_parallel import local_weight
from lingua.probe import is_probing
from lingua.transformer import RMSNorm, check_sizes, fused_weight, init_linear, query_heads

# With fewer tokens reading the weights dominates, and concatenating them reads them twice.
FUSE_TOKENS = 512
# The backward of a joined product copies the gradients of its outputs into one tensor. In hybrids
# of 600M and 1B parameters, that takes longer than separate products.
WIDE = 4096  # from so many outputs on, products are separate
NARROW = 512  # linears of fewer outputs stay joined

Tensors = tuple[Tensor, ...]


@dataclass
class LinearCache(MixerCache):
    state_BHKV: Tensor  # fp32: it sums over the whole past
    conv_state_BTC: Tensor | None  # the last conv_size - 1 inputs of the convolution
    length_B: Tensor | None  # int64, tokens seen, if the mixer uses positions
    # (streams before the convolution, *rest) of the last step, for `repeat_step`; null = not kept
    last_inputs: Tensors | None = None

    def keep(self, streams: Tensor, rest: Tensors) -> None:
        if self.last_inputs is not None:
            self.last_inputs = (streams, *rest)


class LinearMixer(Mixer):
    """A mixer whose past is a matrix per head, whose size doesn't depend on the length.

    A subclass names its linears and kernels, sets the heads, dims and `conv` (None: the streams are
    not convolved), and gives `inputs`. It gives `output` too, unless the norm of each head is gated
    by the first of `rest`.
    """

    reads = Mixer.reads | {"mixer_norm_eps"}
    keeps_tokens = False
    stream_linears: ClassVar[tuple[str, ...]] = ("wq", "wk", "wv")  # in the order of the streams
    rest_linears: ClassVar[tuple[str, ...]]  # the other linears of the input
    # recurrence(*inputs, state=, cu_seqlens=) -> o (B, T, H, V), fp32 state (N, H, K, V) after the
    # last token; `state` is the one before the first, zeros if None.
    recurrence: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    # recurrence_step(*inputs, state_BHKV=) -> o (B, H, V); the state is updated in place.
    recurrence_step: ClassVar[Callable[..., Tensor]]
    state_flops: ClassVar[int]  # FLOPs of the recurrence per token and entry of the state
    uses_positions: ClassVar[bool] = False
    unit_keys: ClassVar[bool] = False  # `inputs` takes q and k of unit norm, and v, by head

    key_dim: int
    value_dim: int
    conv: ShortConv | None
    norm: nn.Module

    @abstractmethod
    def inputs(self, streams: Any, rest: Tensors, positions: Tensor | None) -> Tensors:
        """Return the inputs of the recurrence: q, k, v by head, and others.

        streams and rest are (B, T, ...), or (B, ...) in a step; with `unit_keys`, streams is
        (q, k, v). positions, if `uses_positions`, are (T,) or (B, T), or (B,) in a step.
        """

    def output(self, o: Tensor, streams: Any, rest: Tensors) -> Tensor:
        """Return the input of `wo`, (..., H * V), for o (..., H, V)."""
        return self.norm(o, self.split_heads(rest[0], self.value_dim)).flatten(-2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensors]:
        """Return (streams (..., C), rest) of x (..., D)."""
        streams, rest = self._linears(self.stream_linears), self._linears(self.rest_linears)
        return self.expand(*project_streams(x, streams, rest))

    def expand(self, streams: Tensor, rest: Tensors) -> tuple[Tensor, Tensors]:
        """Finish the projection, such as the second half of low-rank ones."""
        return streams, rest

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        streams, rest = self.project(x_BTD)
        if self.unit_keys:
            assert self.conv is not None
            streams = self.conv.unit_heads(streams, self.n_heads, self.key_dim, cu_seqlens)
        elif self.conv is not None:
            streams = self.conv(streams, cu_seqlens=cu_seqlens)
        positions = None
        if self.uses_positions:
            positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        inputs = self.inputs(streams, rest, positions)
        o, _ = self.recurrence(*inputs, state=None, cu_seqlens=cu_seqlens)
        return self.wo(self.output(o, streams, rest))

    def init_cache(
        self, batch_size: int, max_seqlen: int, like: Tensor, window: int | None = None
    ) -> LinearCache:
        shape, conv = (batch_size, self.n_heads, self.key_dim, self.value_dim), self.conv
        return LinearCache(
            like.new_zeros(shape, dtype=torch.float32),
            None if conv is None else like.new_zeros(batch_size, conv.state_len, conv.channels),
            like.new_zeros(batch_size, dtype=torch.int64) if self.uses_positions else None,
        )

    def prefill(
        self, x_BTD: Tensor, cache: LinearCache, prompts: Prompts, window: int | None = None
    ) -> Tensor:
        cu_seqlens = prompts.cu_seqlens
        rows, lengths = prompts.rows_and_lengths(x_BTD)
        streams, rest = self.project(x_BTD)
        if self.conv is not None:
            assert cache.conv_state_BTC is not None
            conv_state, conv_input = cache.conv_state_BTC[rows], streams
            streams = self.conv(conv_input, state=conv_state, cu_seqlens=cu_seqlens)
            next_state = self.conv.next_state(conv_input, conv_state, cu_seqlens)
            cache.conv_state_BTC[rows] = next_state.to(conv_state.dtype)
        positions = None
        if cache.length_B is not None:
            positions = prompts.positions(x_BTD, cache.length_B[rows])
            cache.length_B[rows] += lengths
        streams = self.split(streams)
        state, inputs = cache.state_BHKV[rows], self.inputs(streams, rest, positions)
        o, state = self.recurrence(*inputs, state=state, cu_seqlens=cu_seqlens)
        cache.state_BHKV[rows] = state
        return self.wo(self.output(o, streams, rest))

    def step(self, x_B1D: Tensor, cache: LinearCache) -> Tensor:
        streams, rest = self.project(x_B1D[:, 0])
        cache.keep(streams, rest)
        if self.conv is not None:
            assert cache.conv_state_BTC is not None
            streams = self.conv.step(streams, cache.conv_state_BTC)
        return self.wo(self.step_heads(streams, rest, cache))[:, None]

    def add_step(self, h_B1D: Tensor, norm: RMSNorm, cache: LinearCache) -> Tensor:
        linears = self.decode_linears()
        weight, out = decode_weight(linears), decode_weight((self.wo,))
        if weight is None or out is None:
            return super().add_step(h_B1D, norm, cache)
        h_BD, conv = h_B1D[:, 0], None
        if self.conv is not None and self.conv.weight is not None:
            assert cache.conv_state_BTC is not None
            conv = Conv(self.conv.weight, self.conv.bias, cache.conv_state_BTC)
        product = decode_linear(h_BD, weight, norm=Norm(norm.weight, norm.eps), conv=conv)
        n_streams = len(self.stream_linears)
        sizes = [sum(linear.out_features for linear in linears[:n_streams])]
        sizes += [linear.out_features for linear in linears[n_streams:]]
        streams, *rest = product.split(sizes, dim=-1)
        before_conv = streams if conv is None else conv.state_BSC[:, -1]
        if self.conv is not None and conv is None:
            streams = F.silu(streams)
        streams, rest = self.expand(streams, tuple(rest))
        cache.keep(before_conv, rest)
        y = self.step_heads(streams, rest, cache)
        return decode_linear(y, out, residual_BN=h_BD)[:, None]

    def repeat_step(
        self,
        h_B1D: Tensor,
        norm: RMSNorm,
        cache: LinearCache,
        source: MixerCache | None,
        skipped: SkippedLoops,
    ) -> None:
        if not isinstance(source, LinearCache) or not source.last_inputs:
            super().repeat_step(h_B1D, norm, cache, source, skipped)
            return
        streams, *rest = source.last_inputs
        update = self.skipped_update(streams, tuple(rest), cache)
        if update is not None and update.has_kernel:
            skipped.updates.append(update)
            return
        if self.conv is not None:
            assert cache.conv_state_BTC is not None
            streams = self.conv.step(streams, cache.conv_state_BTC)
        self.step_heads(streams, tuple(rest), cache)

    def skipped_update(
        self, streams: Tensor, rest: Tensors, cache: LinearCache
    ) -> DeltaUpdate | None:
        """Return what extends the cache by inputs before the convolution, if a kernel does it."""
        return None

    def step_heads(self, streams: Tensor, rest: Tensors, cache: LinearCache) -> Tensor:
        """Run the recurrence and `output` for one token of each row; the cache grows in place."""
        streams = self.split(streams)
        inputs = self.inputs(streams, rest, cache.length_B)
        o = self.recurrence_step(*inputs, state_BHKV=cache.state_BHKV)
        if cache.length_B is not None:
            cache.length_B += 1
        return self.output(o, streams, rest)

    def fused_linears(self) -> tuple[nn.Linear, ...]:
        return self._linears(self.stream_linears + self.rest_linears)

    def decode_linears(self) -> tuple[nn.Linear, ...]:
        return self.fused_linears()

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for name, child in self.named_children():
            if isinstance(child, nn.Linear):
                init_linear(child, init_std, factor if name == "wo" else 1.0)
            else:
                child.reset_parameters()  # pyright: ignore[reportCallIssue]

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        products = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        conv = 0 if self.conv is None else 2 * self.conv.channels * self.conv.size
        state = self.n_heads * self.key_dim * self.value_dim
        return products + conv + self.state_flops * state

    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        conv = 0 if self.conv is None else self.conv.state_len * self.conv.channels
        return 4 * self.n_heads * self.key_dim * self.value_dim + conv * dtype.itemsize

    def step_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        return 2 * self.state_bytes(seqlen, dtype, window)  # read and written

    def tp_plan(self) -> TensorParallelPlan:
        heads = f"the heads (model.{self.module_name}.n_heads or model.n_heads)"
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        channels = ((keys, True), (keys, True), (values, True))  # of q, k and v
        return TensorParallelPlan({heads: self.n_heads}, conv_channels=channels)

    def _linears(self, names: tuple[str, ...]) -> tuple[nn.Linear, ...]:
        return tuple(getattr(self, name) for name in names)

    def split_heads(self, x: Tensor, head_dim: int) -> Tensor:
        """Return (..., H, head_dim) of (..., H * head_dim)."""
        return x.unflatten(-1, (self.n_heads, head_dim))

    def split(self, streams: Tensor) -> Any:
        """Return what `inputs` takes of the convolved streams."""
        return unit_heads(streams, self.n_heads, self.key_dim) if self.unit_keys else streams

    def split_qkv(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k (..., H, K) and v (..., H, V) of streams that hold q, k and v in order."""
        keys = self.n_heads * self.key_dim
        q, k, v = streams.split([keys, keys, self.n_heads * self.value_dim], dim=-1)
        return (
            self.split_heads(q, self.key_dim),
            self.split_heads(k, self.key_dim),
            self.split_heads(v, self.value_dim),
        )


class HeadOptions(Protocol):
    """The options of a linear mixer's heads, in its section of `model:`."""

    n_heads: int | None
    head_dim: int | None
    expand_v: float


def head_shape(
    shared: MixerArgs, own: HeadOptions, name: str, key_share: float = 1
) -> tuple[int, int, int]:
    """Return (heads, key dim, value dim) of the section `name`, such as "model.gdn".

    By default there are as many heads as query heads, whose keys take `key_share` of model.dim.
    UserError unless all three are whole numbers.
    """
    check_sizes(name, own, "n_heads", "head_dim")
    n_heads = own.n_heads or query_heads(shared)
    key_dim = own.head_dim or key_share * shared.dim / n_heads
    if key_dim != int(key_dim):
        raise UserError(
            f"{name}.head_dim=null must be a whole number, and {key_share:g} * model.dim / n_heads "
            f"= {key_share:g} * {shared.dim} / {n_heads} is not; set {name}.head_dim"
        )
    value_dim = key_dim * own.expand_v
    if value_dim < 1 or value_dim != int(value_dim):
        raise UserError(
            f"{name}.expand_v={own.expand_v} times the key dim {key_dim:g} must be a whole number; "
            "use 1, 1.5 or 2"
        )
    return n_heads, int(key_dim), int(value_dim)


def may_read_weights(linears: Sequence[nn.Linear]) -> bool:
    """Whether multiplying by the weights does what calling the layers does."""
    return not is_probing()


def project_streams(
    x: Tensor, streams: Sequence[nn.Linear], rest: Sequence[nn.Linear]
) -> tuple[Tensor, Tensors]:
    """Project x (..., D): concatenate the outputs of `streams`, and don't concatenate `rest`.

    One matrix product if the weights are fused, one or a few if x has many tokens.
    """
    linears = (*streams, *rest)
    read_weights = may_read_weights(linears)
    weight = fused_weight(linears) if read_weights else None
    if weight is None and (x.shape[:-1].numel() < FUSE_TOKENS or not read_weights):
        outputs = [linear(x) for linear in linears]
        return torch.cat(outputs[: len(streams)], dim=-1), tuple(outputs[len(streams) :])
    sizes = [sum(linear.out_features for linear in streams)]
    sizes += [linear.out_features for linear in rest]
    if weight is None and sum(sizes) >= WIDE:
        first = F.linear(x, joined_weight(streams))
        others = [y for group in join_narrow(rest) for y in joined_product(x, group)]
        return first, tuple(others)
    weight = joined_weight(linears) if weight is None else weight
    first, *others = F.linear(x, weight).split(sizes, dim=-1)
    return first, tuple(others)


def join_narrow(linears: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """Group neighbors of fewer than NARROW outputs. Each other linear is a group of one."""
    groups: list[list[nn.Linear]] = []
    for linear in linears:
        if groups and max(linear.out_features, groups[-1][-1].out_features) < NARROW:
            groups[-1].append(linear)
        else:
            groups.append([linear])
    return groups


def joined_product(x: Tensor, linears: Sequence[nn.Linear]) -> Tensors:
    """Return the outputs of all linears, from one product."""
    y = F.linear(x, joined_weight(linears))
    if len(linears) == 1:  # the backward of a split would copy the gradient
        return (y,)
    return y.split([linear.out_features for linear in linears], dim=-1)


def joined_weight(linears: Sequence[nn.Linear]) -> Tensor:
    weights = [local_weight(linear) for linear in linears]
    return weights[0] if len(weights) == 1 else torch.cat(weights)
