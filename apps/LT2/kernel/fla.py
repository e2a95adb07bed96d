"""What the operators on fla's kernels share: import, packed documents, gradients, what is refused.

fla is imported at the first call, which takes seconds.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.weak import WeakIdKeyDictionary

from apps.LT2.kernel.documents import document_of_tokens, host_cu_seqlens, upload, upload_cu_seqlens
from lingua.errors import UserError

CHUNK = 64  # tokens that fla's kernels take at a time
DTYPES = (torch.bfloat16, torch.float16)
VALUES, DECAY = 2, 3  # places among the tensors of an operator
MAX_KEY_WIDTH = 256  # of the state kernels
# Below, fla 0.6.0 reads past its tensors on Hopper: wrong dq, dk and dg, and at times a crash.
MIN_WIDTH = 64


@cache
def import_fla(module: str) -> ModuleType:
    """A module of fla, e.g. "fla.ops.gated_delta_rule.chunk"."""
    # Looking for other backends at every call costs more than small kernels take to run.
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "linear attention on CUDA needs flash-linear-attention, which cannot be imported "
            f"({error}): pip install -e '.[gpu]'"
        ) from error


@cache
def sum_decay_gradient_in_fp32() -> None:
    """Mend the kernel that computes the gradient of a decay by head, in this process.

    fla 0.6.0 multiplies states by their gradients and adds up the K x V products in the dtype of
    the inputs: 2% off in bf16 (docs/LOG.md, 2026-11-24). A version without the fault is left alone.
    """
    kernel = import_fla("fla.ops.common.chunk_o").chunk_bwd_kernel_dqkwg
    while not hasattr(kernel, "src"):  # under the wrappers that tune it
        kernel = kernel.fn
    in_fp32 = "tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32))"
    kernel._unsafe_update_src(kernel.src.replace("tl.sum(b_h * b_dh)", in_fp32))


def check_fla_inputs(operator: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what no kernel of fla takes: CPU tensors, and dtypes other than one of 16 bits."""
    if not v.is_cuda:
        raise UserError(
            f"{operator}(impl='fla') needs CUDA tensors, got {v.device}; "
            "impl='chunked' runs everywhere"
        )
    if v.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UserError(
            f"{operator}(impl='fla') needs q, k and v all bf16 or all fp16, got "
            f"{q.dtype}, {k.dtype}, {v.dtype}; use distributed.model_dtype=bf16 or impl='chunked'"
        )


def check_delta_rule_inputs(operator: str, options: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """The same, with the head widths that the delta rules take; `options` is their section, such
    as model.gdn."""
    check_fla_inputs(operator, q, k, v)
    K, V = k.shape[-1], v.shape[-1]
    if K > MAX_KEY_WIDTH or K % 2 or V % 2:
        raise UserError(
            f"{operator}(impl='fla') needs an even key width of at most {MAX_KEY_WIDTH} and an "
            f"even value width per head, got {K} and {V}; change the head widths (n_heads, "
            f"{options}) or use impl='chunked'"
        )


def check_even_widths(operator: str, options: str, k: Tensor, v: Tensor) -> None:
    """Refuse odd head widths, which kernels compile wrongly for 16-bit numbers; `options` is the
    section that sets them, such as model.gdn."""
    K, V = k.shape[-1], v.shape[-1]
    if K % 2 or V % 2:
        raise UserError(
            f"{operator}(impl='fla') needs even key and value widths per head, got {K} and {V}; "
            f"change the head widths (n_heads, {options}) or use impl='chunked'"
        )


def sum_decay(g: Tensor, packed: dict[str, Tensor], *, reverse: bool = False) -> Tensor:
    """g (B, T, H) or (B, T, H, K) summed inside each chunk, over the tokens up to each.

    The sums are in base 2, which is what fla's kernels raise to a power. With `reverse`: over the
    tokens from each on, and as they are, which is the gradient of the former in base e.
    """
    scale = None if reverse else 1 / math.log(2)
    return import_fla("fla.ops.utils").chunk_local_cumsum(
        g, chunk_size=CHUNK, reverse=reverse, scale=scale, **packed
    )


def widen(x: Tensor) -> Tensor:
    """x with zeros up to the narrowest head (last axis) whose kernels are right.

    Contiguous, and made so outside the operators, where a compiler can do it with the producer.
    """
    missing = MIN_WIDTH - x.shape[-1]
    return (F.pad(x, (0, missing)) if missing > 0 else x).contiguous()


def widen_state(state_NHKV: Tensor | None) -> Tensor | None:
    """The same for both widths of a state, in fp32."""
    if state_NHKV is None:
        return None
    K, V = state_NHKV.shape[-2:]
    state = state_NHKV.float()
    if min(K, V) < MIN_WIDTH:
        state = F.pad(state, (0, max(MIN_WIDTH - V, 0), 0, max(MIN_WIDTH - K, 0)))
    return state.contiguous()


def register_gradient(forward: CustomOpDef, backward: CustomOpDef, *, sums_decay: bool) -> None:
    """Make `backward` the gradient of `forward`, both operators of one recurrence:

        forward(q, k, v, *rest, state, cu_seqlens, scale) -> o, final state, *kept
        backward(q, k, v, *rest, *kept, state, cu_seqlens, scale, do, dfinal)
            -> the gradients of q, k, v, *rest and state

    sums_decay: `rest` begins with the decay and `kept` with what its sums are, which backward reads
    in the decay's place. A decay with one axis is a constant and has no gradient.
    """

    def save(ctx, inputs, output) -> None:
        *given, state, cu_seqlens, ctx.scale = inputs
        _, _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # or zeros the size of `kept` are written for nothing
        if sums_decay:
            given[DECAY], *kept = kept
        ctx.n_given = len(given)
        ctx.save_for_backward(*given, *kept, state, cu_seqlens)

    def differentiate(ctx, do, dfinal, *_) -> tuple[Tensor | None, ...]:
        *saved, state, cu_seqlens = ctx.saved_tensors
        given = saved[: ctx.n_given]
        if do is None and dfinal is None:
            return (None,) * (len(given) + 3)
        if do is None:
            do = torch.zeros_like(given[VALUES])
        *grads, dstate = backward(*saved, state, cu_seqlens, ctx.scale, do, dfinal)
        if given[DECAY].ndim == 1:
            grads[DECAY] = None
        return *grads, None if state is None else dstate, None, None

    forward.register_autograd(differentiate, setup_context=save)


@dataclass(frozen=True)
class PackedTables:
    """What fla's kernels read of the bounds of packed documents.

    fla builds such tables itself, for which it waits for the device, and keeps them by the identity
    of cu_seqlens: a buffer that is written anew would get the tables of its old content. These are
    built of numbers on the host, of a copy for every content that layers and loops share.
    """

    bounds: list[int]
    cu_seqlens: Tensor  # (n_docs + 1,) int32
    chunk_indices: Tensor  # (chunks, 2) int32: document, and which of its chunks

    @staticmethod
    def of(bounds: list[int], device: torch.device) -> PackedTables:
        chunks = [
            (document, chunk)
            for document, (start, end) in enumerate(itertools.pairwise(bounds))
            for chunk in range(-(-(end - start) // CHUNK))
        ]
        flat = upload(list(itertools.chain(*chunks)), device, torch.int32)
        return PackedTables(bounds, upload_cu_seqlens(bounds, device), flat.view(-1, 2))


_tables = WeakIdKeyDictionary()  # cu_seqlens -> its tables
_tables_without_empty = WeakIdKeyDictionary()  # cu_seqlens -> (its bounds, what fla is given)


def packed_arguments(cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """fla's arguments for packed documents: cu_seqlens and chunk_indices; {} where there are none.

    Where `host_cu_seqlens` knows the bounds, nothing waits for the device.
    """
    if cu_seqlens is None:
        return {}
    bounds, known = host_cu_seqlens(cu_seqlens), _tables.get(cu_seqlens)
    if known is None or known.bounds != bounds:
        known = _tables[cu_seqlens] = PackedTables.of(bounds, cu_seqlens.device)
    return {"cu_seqlens": known.cu_seqlens, "chunk_indices": known.chunk_indices}


class KnownNumber(int):
    """What `.item()` finds without asking a device."""

    def item(self) -> int:
        return int(self)


class ChunkOffsets(Tensor):
    """(n_docs + 1,) int64: chunks before each document; the last, all of them, the host knows."""

    # otherwise each use of it is looked at
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    n_chunks: int

    def __getitem__(self, index: int) -> KnownNumber:
        assert index == -1, "the other entries are on the device"
        return KnownNumber(self.n_chunks)


_offsets = WeakIdKeyDictionary()  # cu_seqlens -> (its bounds and the size of a chunk, offsets)


def chunk_offsets(cu_seqlens: Tensor, chunk_size: int) -> ChunkOffsets:
    """As fla's `prepare_chunk_offsets`; nothing waits where `host_cu_seqlens` knows the bounds."""
    key, known = (host_cu_seqlens(cu_seqlens), chunk_size), _offsets.get(cu_seqlens)
    if known is None or known[0] != key:
        lengths = (end - start for start, end in itertools.pairwise(key[0]))
        ends = list(itertools.accumulate((-(-n // chunk_size) for n in lengths), initial=0))
        offsets = upload(ends, cu_seqlens.device, torch.int64).as_subclass(ChunkOffsets)
        offsets.n_chunks = ends[-1]
        known = _offsets[cu_seqlens] = (key, offsets)
    return known[1]


def packed_tokens(cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Bounds of the documents that have tokens (n + 1,), and (document, position) of each token
    (T, 2), both int32; shared as in `packed_arguments`.

    Without the empty documents: fla's own tables number documents by their first tokens, so that
    an empty one would shift those after it.
    """
    if cu_seqlens is None:
        return None, None
    bounds, known = host_cu_seqlens(cu_seqlens), _tables_without_empty.get(cu_seqlens)
    if known is None or known[0] != bounds:
        some = upload_cu_seqlens(list(dict.fromkeys(bounds)), cu_seqlens.device)
        tokens = torch.stack(document_of_tokens(some, bounds[-1]), dim=1).int()
        known = _tables_without_empty[cu_seqlens] = (bounds, some, tokens)
    return known[1:]


@cache
def take_tables_from_host() -> None:
    """Have fla's functions that take no tables of packed documents use ours, in this process.

    In fla 0.6.0 the states of `simple_gla` and `gla` read the number of chunks back from the device
    in every call, and the choice of blocks of `nsa` the number of tokens for every new bounds.
    """
    for module, name, table in (
        ("fla.ops.common.chunk_h", "prepare_chunk_offsets", chunk_offsets),
        ("fla.ops.nsa.parallel", "prepare_token_indices", lambda bounds: packed_tokens(bounds)[1]),
    ):
        names = vars(import_fla(module))
        if name in names:
            names[name] = table
