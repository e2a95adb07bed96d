"""The protocol of a token mixer, and what mixer caches share.

Shapes: B sequences, T tokens, D model dim. A packed call has B = 1: its documents are concatenated
along T, and `cu_seqlens` (n_docs + 1,) int32 holds the offsets of their first tokens, from 0 to T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from apps.LT2.kernel.documents import document_of_tokens, local_positions
from apps.LT2.kernel.skipped_loops import SkippedLoops
from apps.LT2.mixers.parts import GroupedRMSNorm, ShortConv
from apps.LT2.mixers.rotary import RopeScalingArgs
from lingua.parallel.tensor_parallel import ALONE, TensorParallel, split_linears
from lingua.transformer import BaseTransformerArgs, RMSNorm


class MixerArgs(BaseTransformerArgs):
    """The options of `model:` that mixers read, besides their sections such as `model.gdn`.

    `LoopedTransformerArgs` gives these their place among the fields and their defaults.
    """

    attn_impl: str
    gated_attn: bool
    attn_bias: str
    qk_norm: bool
    rope_scaling: RopeScalingArgs | None
    mixer_norm_eps: float | None

    @property
    def output_norm_eps(self) -> float:
        """Epsilon of the norm on the output of a linear mixer's recurrence."""
        return self.norm_eps if self.mixer_norm_eps is None else self.mixer_norm_eps


@dataclass
class MixerCache:
    """The past of one mixer in one (loop, layer). Every field is a tensor with a row a sequence."""

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the given rows, or all if None, in place."""
        for tensor in self._tensors():
            if rows is None:
                tensor.zero_()
            else:
                tensor.index_fill_(0, rows, 0)

    def copy_rows(self, rows: Tensor, source: MixerCache, source_rows: Tensor) -> None:
        """Copy `source_rows` of a cache of the same kind to `rows`, both (n,) int64, in place."""
        for tensor, other in zip(self._tensors(), source._tensors(), strict=True):
            tensor.index_copy_(0, rows, other.index_select(0, source_rows))

    def fill_randomly(self, n_tokens: int) -> None:
        """Fill every row with `n_tokens` tokens of noise, in place, to time steps."""
        for tensor in self._tensors():
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.fill_(n_tokens)  # the only integers are token counts

    def can_crop(self, longest: int) -> bool:
        """Whether `crop` can remove tokens, where the longest row holds `longest`."""
        return False

    def crop(self, length_B: Tensor) -> None:
        """Shorten each row to its first `length_B` tokens, in place."""
        raise NotImplementedError(f"{type(self).__name__} doesn't keep single tokens")

    def copy_prefix(self, source: MixerCache) -> None:
        """Copy all rows of a cache of fewer slots, in place."""
        for tensor, other in zip(self._tensors(), source._tensors(), strict=True):
            tensor[tuple(slice(n) for n in other.shape)] = other

    def copy_last(self, source: Any, skipped: SkippedLoops) -> bool:
        """Extend every row by the last token of a cache of the same kind, when `skipped` runs.

        Return False, and do nothing, if this kind doesn't keep what it needs.
        """
        return False

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a cache of `change(tensor)` for every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {n: change(x) for n, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **changed)

    def snapshot(self) -> list[Tensor]:
        """Return copies of all tensors, for `restore`."""
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, saved: list[Tensor]) -> None:
        """Write a snapshot back, in place."""
        for tensor, copy in zip(self._tensors(), saved, strict=True):
            tensor.copy_(copy)

    def _tensors(self) -> list[Tensor]:
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]


class Extension(NamedTuple):
    """What the host knows about a sequence that a prefill extends."""

    row: int  # of the cache
    held: int  # tokens already in that row
    new: int  # tokens to add


Past = Sequence[Extension]


class Prompts(NamedTuple):
    """The sequences of a prefill, and the cache rows that they extend."""

    cu_seqlens: Tensor | None = None  # (n + 1,) int32 of packed documents; None: one a row of x
    rows: Tensor | None = None  # (n,) int64, the cache row of each sequence; None: row i for i
    # The host's view of each sequence, () if all rows are empty. With None, a mixer that needs it
    # copies it from the device: a sync in every (loop, layer), and a graph break.
    past: Past | None = None

    def rows_and_lengths(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cache rows to extend and the numbers of new tokens, both (n,) int64."""
        n_rows, n_tokens = x_BTD.shape[:2]
        if self.cu_seqlens is None:
            # Equal lengths are computed like others: Inductor of torch 2.11 to 2.13 fails on sums
            # of a constant tensor whose value is a symbolic size.
            offsets = n_tokens * torch.arange(n_rows + 1, device=x_BTD.device)
        else:
            assert n_rows == 1, f"packed input has batch size 1, not {n_rows}"
            offsets = self.cu_seqlens.long()
        lengths = offsets.diff()
        rows = self.rows
        if rows is None:
            rows = torch.arange(len(lengths), device=x_BTD.device)
        assert rows.shape == lengths.shape, f"{len(lengths)} sequences, {tuple(rows.shape)} rows"
        return rows, lengths

    def positions(self, x_BTD: Tensor, held: Tensor) -> Tensor:
        """Return the positions (B, T) of the new tokens after `held` (n,) cached ones."""
        n_tokens = x_BTD.shape[1]
        if self.cu_seqlens is None:
            return local_positions(n_tokens, None, x_BTD.device) + held[:, None]
        document, position = document_of_tokens(self.cu_seqlens, n_tokens)
        return (position + held[document])[None]

    def known_past(self, rows: Tensor, held: Tensor, lengths: Tensor) -> Past:
        """Return `past`, or copy it from the device if the caller did not give it."""
        if self.past is not None:
            return self.past
        pairs = zip(rows.tolist(), held.tolist(), lengths.tolist(), strict=True)
        past = [Extension(*numbers) for numbers in pairs]
        return past if any(extension.held for extension in past) else ()


def by_sequence(past: Past, *tensors: Tensor) -> list[tuple[Any, ...]]:
    """Return (extension, *parts) of each sequence that has new tokens.

    Each of `tensors` (B, T, ...) gives a part (n_new, ...).
    """
    sizes = [extension.new for extension in past]
    parts = (x.flatten(0, 1).split(sizes) for x in tensors)
    return [row for row in zip(past, *parts, strict=True) if row[0].new]


@dataclass(frozen=True)
class OwnLoss:
    """A loss that a mixer adds to the language model's. Each trains different weights."""

    name: str  # of its metric, such as "dsa_indexer"
    module: str  # attribute of the mixer that holds the weights it trains


@dataclass(frozen=True)
class TensorParallelPlan:
    """How ranks share a mixer's heads. `wo` is split by inputs, every other linear by outputs."""

    divides: dict[str, int]  # sizes that tp_size must divide, by meaning and option
    heads: tuple[str, ...] = ("n_heads",)  # attributes that become this rank's share
    # Channels of a convolution, in order: (number, whether ranks share them or each has all).
    conv_channels: Sequence[tuple[int, bool]] = ()

    def split(self, mixer: Mixer, tp: TensorParallel) -> None:
        """Keep this rank's heads of `mixer`, in place. 1-D parameters stay whole."""
        mixer.tp = tp
        for name in self.heads:
            setattr(mixer, name, getattr(mixer, name) // tp.size)
        children = dict(mixer.named_children())
        linears = [name for name, child in children.items() if isinstance(child, nn.Linear)]
        outputs = tuple(name for name in linears if name != "wo")
        split_linears(mixer, tp, outputs=outputs, inputs=("wo",))
        for child in children.values():
            if isinstance(child, ShortConv):
                child.split(tp, self.conv_channels)
            elif isinstance(child, GroupedRMSNorm):
                child.split(tp)


class Mixer(nn.Module, ABC):
    """Mix tokens along time: (B, T, D) -> (B, T, D).

    A subclass takes `MixerArgs` and the options of its section, such as `model.gdn`. It holds no
    past: a looped block runs it `loop_count` times per token, so the caller keeps one cache for
    every (loop, layer). `window` counts the keys that a token sees, itself included.
    """

    module_name: ClassVar[str]  # attribute of the block, part of checkpoint keys
    reads: ClassVar[frozenset[str]] = frozenset({"n_heads"})  # fields of MixerArgs, for warnings
    uses_fla: ClassVar[bool] = True  # runs flash-linear-attention's kernels on CUDA
    zero_at_start: ClassVar[tuple[str, ...]] = ()  # parameters initialized to zero
    own_loss: ClassVar[OwnLoss | None] = None
    keeps_tokens: ClassVar[bool] = True  # its cache has a slot per token, and can be cropped
    tp: TensorParallel = ALONE
    n_heads: int  # of this rank
    wo: nn.Linear  # the output projection

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """Mix whole sequences."""

    def forward_with_loss(self, x_BTD: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Run `forward` and return `own_loss` too, a scalar mean over tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no own loss")

    @abstractmethod
    def init_cache(
        self, batch_size: int, max_seqlen: int, like: Tensor, window: int | None = None
    ) -> Any:
        """Allocate an empty cache of `batch_size` rows, with the device and dtype of `like`."""

    @abstractmethod
    def prefill(
        self, x_BTD: Tensor, cache: Any, prompts: Prompts, window: int | None = None
    ) -> Tensor:
        """Run `forward` on tokens that extend cached sequences; the cache grows in place."""

    @abstractmethod
    def step(self, x_B1D: Tensor, cache: Any) -> Tensor:
        """Extend every row by one token, in place. Shapes don't depend on the cached lengths."""

    def add_step(self, h_B1D: Tensor, norm: RMSNorm, cache: Any) -> Tensor:
        """Return h + step(norm(h)). A subclass may fuse the norm and the sum into its products."""
        return h_B1D + self.step(norm(h_B1D), cache)

    def repeat_step(
        self,
        h_B1D: Tensor,
        norm: RMSNorm,
        cache: Any,
        source: MixerCache | None,
        skipped: SkippedLoops,
    ) -> None:
        """Extend every row by one token in a loop that it skips, in place.

        h is what the layer got in the last loop that ran. `source` is this mixer's cache of that
        loop, None if another mixer ran. Without `copy_last`, the projections run again. Work that
        `skipped` can do for all layers and loops together is added there.
        """
        if source is None or not cache.copy_last(source, skipped):
            self.step(norm(h_B1D), cache)

    @abstractmethod
    def fused_linears(self) -> tuple[nn.Linear, ...]:
        """Return the linears of the input, whose weights inference fuses."""

    def decode_linears(self) -> tuple[nn.Linear, ...]:
        """Return the linears that `add_step` computes in one product with the norm, or ()."""
        return ()

    @abstractmethod
    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        """Initialize; std is `init_std` or fan_in ** -0.5 for projections, wo's over `factor`."""

    @abstractmethod
    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        """Return the mean FLOPs of a forward per token of a sequence."""

    @abstractmethod
    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        """Return the cache size of one sequence."""

    def step_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        """Return the cache bytes that a step moves for one sequence: by default it reads all."""
        return self.state_bytes(seqlen, dtype, window)

    def begin_step(self, step: int | None) -> None:  # noqa: B027, most mixers need nothing
        """Prepare for the optimizer step after `step` steps; None is inference, the default."""

    @property
    def phase(self) -> Hashable:
        """What `begin_step` has set: a mixer with another phase launches other kernels."""
        return None

    def tp_plan(self) -> TensorParallelPlan | None:
        """Return how tensor parallelism splits the mixer; None if it can't."""
        return None
