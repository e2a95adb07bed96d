"""What every token mixer promises to the model, and what its caches share.

Shapes: B sequences, T tokens, D model width. Packed calls have B = 1 and documents one after the
other along T; `cu_seqlens` (n_docs + 1, int32) holds their boundaries, from 0 to T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from apps.LT2.kernel.documents import document_of_tokens, local_positions
from lingua.parallel.tensor_parallel import ALONE, TensorParallel, split_linears
from lingua.transformer import BaseTransformerArgs


class MixerArgs(BaseTransformerArgs):
    """The options of `model:` that mixers read, besides the section of their own name.

    `LoopedTransformerArgs` gives these two their place among the fields and their defaults.
    """

    attn_impl: str
    gated_attn: bool


@dataclass
class MixerCache:
    """Memory of one mixer in one (loop, layer); every field is a tensor with a row a sequence."""

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the sequences in `rows` (all of them if None), in place."""
        for tensor in self._tensors():
            if rows is None:
                tensor.zero_()
            else:
                tensor.index_fill_(0, rows, 0)

    def copy_rows(self, rows: Tensor, source: MixerCache, source_rows: Tensor) -> None:
        """Hold in `rows` (n,) int64 what `source_rows` of another cache of this kind hold, or of
        this one: all that a row is, so that its sequence goes on in each of them."""
        for tensor, other in zip(self._tensors(), source._tensors(), strict=True):
            tensor.index_copy_(0, rows, other.index_select(0, source_rows))

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def fill_randomly(self, n_tokens: int) -> None:
        """Hold `n_tokens` tokens of noise in every row, in place: to time steps without prompts."""
        for tensor in self._tensors():
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.fill_(n_tokens)  # counts of tokens are all that a cache has of integers

    def snapshot(self) -> list[Tensor]:
        """Copies of all that the cache holds, for `restore`."""
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, saved: list[Tensor]) -> None:
        """Hold again, in place, what the snapshot holds."""
        for tensor, copy in zip(self._tensors(), saved, strict=True):
            tensor.copy_(copy)

    def _tensors(self) -> list[Tensor]:
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]


class Extension(NamedTuple):
    """What the host knows of a sequence that a prefill extends."""

    row: int  # of the cache
    held: int  # tokens that the row holds already
    new: int  # tokens that come


class Mixer(nn.Module, ABC):
    """Mix tokens along time; the shape (B, T, D) is kept.

    A mixer owns parameters and no memory. Memory is a cache that the caller holds, one for every
    (loop, layer): a looped block runs the same mixer `loop_count` times per token, so state kept
    on the module would be overwritten by the next loop.
    """

    module_name: ClassVar[str]  # attribute of the block that holds it, part of checkpoint keys
    # The metric of a loss of the mixer's own, e.g. "dsa_indexer"; None where it has none.
    loss_name: ClassVar[str | None] = None
    # Fields of `model:` that it reads, beside those of its own section and those of every model.
    reads: ClassVar[frozenset[str]] = frozenset({"n_heads"})
    uses_fla: ClassVar[bool] = True  # whether it runs on flash-linear-attention's kernels on CUDA
    zero_at_start: ClassVar[tuple[str, ...]] = ()  # parameters that start at zero on purpose
    # Linear layers by attribute that tensor parallelism splits: those with a head's outputs, and
    # those with its inputs. A mixer with heads that need more than these overrides `split`.
    by_outputs: ClassVar[tuple[str, ...]] = ()
    by_inputs: ClassVar[tuple[str, ...]] = ()

    n_heads: int  # of this rank
    tp: TensorParallel = ALONE

    def __init__(self, shared: MixerArgs, own: Any = None):
        """`own` holds the options of the mixer's section, such as `model.gdn`, if it has one."""
        super().__init__()

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """All tokens at once, from an empty past."""

    def forward_with_loss(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the mixer's own loss, a scalar whose gradient reaches no weight that
        the language model's loss trains. Only for mixers with a `loss_name`."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")

    def own_loss_parameters(self) -> list[nn.Parameter]:
        """The weights that the mixer's own loss trains, and that no other loss does."""
        return []

    @abstractmethod
    def fused_linears(self) -> tuple[nn.Linear, ...]:
        """The bias-free linears that read the layer's input, whose weights inference joins."""

    def begin_step(self, step: int | None) -> None:  # noqa: B027, most mixers do not care
        """Told before each optimizer step how many are done; None is inference, the default."""

    def split_counts(self) -> dict[str, int] | None:
        """What tensor parallelism has to divide, by what it is and the option that sets it; None
        where the mixer does not split by heads."""
        return None

    def split(self, tp: TensorParallel) -> None:
        """Become the part of it that computes this rank's heads, in place; vectors stay whole."""
        self.tp = tp
        self.n_heads //= tp.size
        split_linears(self, tp, outputs=self.by_outputs, inputs=self.by_inputs)

    @abstractmethod
    def init_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> Any:
        """An empty cache for `batch_size` sequences of up to `max_seqlen` tokens."""

    @abstractmethod
    def prefill(
        self,
        x_BTD: Tensor,
        cache: Any,
        *,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
        window: int | None = None,
        past: Sequence[Extension] | None = None,
    ) -> Tensor:
        """As `forward`, continuing the sequences that the cache holds, which it extends in place.

        rows (n,) int64: the cache row of each sequence of x (of each document when packed);
        None means row i for sequence i.
        past: what the host knows of each of them, () where all rows are empty: then nothing waits
        for the device, and a compiler sees no break. A mixer that needs it and gets None asks the
        device, which takes a moment in every (loop, layer).
        """

    @abstractmethod
    def step(self, x_B1D: Tensor, cache: Any) -> Tensor:
        """One more token of every row, in place; no shape depends on how much is cached."""

    @abstractmethod
    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        """Fill every tensor. Projections get spread init_std, or fan_in ** -0.5 where it is None;
        the output projection's is divided by `factor`."""

    @abstractmethod
    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        """Forward FLOPs of one call per token, a mean over a sequence of `seqlen` tokens."""

    @abstractmethod
    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        """Bytes that one sequence of `seqlen` tokens occupies in one cache."""

    def step_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        """Bytes of one cache that a step must move for a sequence of `seqlen` tokens.

        By default all that is stored is read, and the little that one token adds is left out. A
        mixer that reads a part of it, or that writes it anew, says so.
        """
        return self.state_bytes(seqlen, dtype, window)


def cache_rows(
    x_BTD: Tensor, cu_seqlens: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(rows, lengths), (n,) int64: the cache rows a prefill extends, and by how many tokens."""
    n_rows, n_tokens = x_BTD.shape[:2]
    if cu_seqlens is None:
        # Of bounds, too, though all are alike: Inductor of torch 2.11 to 2.13 fails on the sums of
        # equal lengths that are a variable of the code.
        bounds = n_tokens * torch.arange(n_rows + 1, device=x_BTD.device)
    else:
        assert n_rows == 1, f"packed input has batch size 1, not {n_rows}"
        bounds = cu_seqlens.long()
    lengths = bounds.diff()
    n = lengths.shape[0]
    if rows is None:
        rows = torch.arange(n, device=x_BTD.device)
    assert rows.shape == (n,), f"{n} sequences need {n} rows, not {tuple(rows.shape)}"
    return rows, lengths


def cache_positions(x_BTD: Tensor, cu_seqlens: Tensor | None, starts: Tensor) -> Tensor:
    """(B, T) positions of the tokens of a prefill, whose sequences (n,) already hold `starts`
    tokens each."""
    n_tokens = x_BTD.shape[1]
    if cu_seqlens is None:
        return local_positions(n_tokens, None, x_BTD.device) + starts[:, None]
    document, position = document_of_tokens(cu_seqlens, n_tokens)
    return (position + starts[document])[None]


def known_past(
    past: Sequence[Extension] | None, rows: Tensor, starts: Tensor, lengths: Tensor
) -> Sequence[Extension]:
    """`past` as a prefill was given it; where it was not, the device is asked, and waited for."""
    if past is not None:
        return past
    pairs = zip(rows.tolist(), starts.tolist(), lengths.tolist(), strict=True)
    asked = [Extension(*numbers) for numbers in pairs]
    return asked if any(extension.held for extension in asked) else ()
