"""fla's chunk kernels as custom operators of torch.

fla's entry points break a compiled graph. `ChunkOperator` wraps its kernels as one operator with a
registered backward, so the block around it compiles whole. The module of a recurrence states only
which functions of fla it calls, with which arguments.

fla is imported at the first call, without its layers and models.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.weak import WeakIdKeyDictionary

from apps.LT2.kernel.documents import host_cu_seqlens, upload, upload_cu_seqlens
from apps.LT2.kernel.tuning import limit_tuning
from lingua.errors import UserError

CHUNK = 64  # tokens in a chunk of fla's kernels
DTYPES = (torch.bfloat16, torch.float16)
# fla 0.6.0 reads past the end of narrower heads on Hopper: wrong dq, dk and dg, or a crash.
MIN_HEAD_DIM = 64
DECAY = 3  # index of g among the inputs q, k, v, g, ..

Tensors = tuple[Tensor, ...]
Packed = dict[str, Tensor]  # fla's arguments for packed documents


# ---- fla and its faults


@cache
def import_fla(module: str) -> ModuleType:
    """Import a module of fla, e.g. "fla.ops.gated_delta_rule.chunk", and fix faults of 0.6.0.

    Limits the tuning of its kernels. Raises UserError if fla cannot be imported.
    """
    # fla's search for other backends at every call takes longer than small kernels.
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")
    try:
        for package in ("fla", "fla.ops"):
            _delay_package(package)
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "linear attention on CUDA needs flash-linear-attention, which cannot be imported "
            f"({error}): pip install -e '.[gpu]'"
        ) from error
    _fix_faults()
    limit_tuning()
    return found


@cache
def _delay_package(name: str) -> None:
    """Let modules of a package of fla be imported without running its `__init__.py`.

    That of fla and of fla.ops imports all operators, layers and models, and transformers. It runs
    when code outside this project asks for one of its names.
    """
    if name in sys.modules:
        return
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"No module named '{name}'")
    loader, package = spec.loader, module_from_spec(spec)

    def run_and_get(attribute: str) -> Any:
        if attribute.startswith("__") and attribute != "__all__":
            raise AttributeError(attribute)
        del vars(package)["__getattr__"]
        loader.exec_module(package)
        return getattr(package, attribute)

    vars(package).update(__getattr__=run_and_get, __version__=version("fla-core"))
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


@cache
def _fix_faults() -> None:
    _sum_decay_gradient_in_fp32(importlib.import_module("fla.ops.common.chunk_o"))
    # The states of gla and simple_gla read the size of their table from the device. Ours knows it
    # on the host.
    names = vars(importlib.import_module("fla.ops.common.chunk_h"))
    if "prepare_chunk_offsets" in names:
        names["prepare_chunk_offsets"] = chunk_offsets


def _sum_decay_gradient_in_fp32(chunk_o: ModuleType) -> None:
    """Patch the kernel that computes the gradient of a decay per head.

    fla 0.6.0 sums K x V products of states and their gradients in the inputs' dtype: 2% off in bf16
    (docs/LOG.md, 2026-11-24). A version without this line stays unchanged.
    """
    kernel = chunk_o.chunk_bwd_kernel_dqkwg
    while not hasattr(kernel, "src"):  # unwrap autotuners
        kernel = kernel.fn
    in_fp32 = "tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32))"
    kernel._unsafe_update_src(kernel.src.replace("tl.sum(b_h * b_dh)", in_fp32))


class _Redirected:
    """A kernel of fla that writes `outputs` in place of the arguments of these names."""

    is_launched = False

    def __init__(self, kernel: Any, **outputs: Tensor):
        self.kernel, self.outputs = kernel, outputs

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        self.is_launched = True
        return lambda **arguments: self.kernel[grid](**{**arguments, **self.outputs})


_ONE_AT_A_TIME = threading.Lock()  # each GPU has its own thread in a backward


def import_with_16_bit_gradients(module: str, launcher: str, kernel: str) -> ModuleType:
    """Import a module of fla whose function `launcher` launches the last kernel of dq and dk.

    The kernel would write both in fp32, and a copy in the inputs' dtype would follow. Patched, it
    writes the inputs' dtype.
    """
    with _ONE_AT_A_TIME:
        _write_16_bit_gradients(module, launcher, kernel)
    return import_fla(module)


@cache
def _write_16_bit_gradients(module: str, launcher: str, kernel: str) -> None:
    names = vars(import_fla(module))
    inner = names[launcher]
    of_kernel = inspect.unwrap(inner).__globals__

    def launch(*, q: Tensor, dq: Tensor, dk: Tensor, **others: Any) -> tuple[Tensor, ...]:
        # fla's own layers may have several value heads for a head of q, and gradients for each.
        outputs = {
            "dq2": torch.empty_like(dq, dtype=q.dtype),
            "dk2": torch.empty_like(dk, dtype=q.dtype),
        }
        with _ONE_AT_A_TIME:
            plain = of_kernel[kernel]
            redirected = of_kernel[kernel] = _Redirected(plain, **outputs)
            try:
                _, _, *rest = inner(q=q, dq=dq, dk=dk, **others)
            finally:
                of_kernel[kernel] = plain
        assert redirected.is_launched, f"{launcher} of {module} does not launch {kernel}"
        return *outputs.values(), *rest

    names[launcher] = launch


# ---- inputs


def check_fla_inputs(operator: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise UserError unless q, k and v are CUDA tensors of one 16-bit dtype."""
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


def check_head_dims(operator: str, section: str, K: int, V: int, max_key_dim: int | None) -> None:
    """Raise UserError for head dims that fla's kernels compute wrongly or refuse.

    section: the options that set them, such as model.gdn.
    """
    if K % 2 or V % 2 or (max_key_dim is not None and max_key_dim < K):
        limit = "" if max_key_dim is None else f" of at most {max_key_dim}"
        raise UserError(
            f"{operator}(impl='fla') needs an even key dim{limit} and an even value dim per head, "
            f"got {K} and {V}; change n_heads or {section}, or use impl='chunked'"
        )


def pad_head_dim(x: Tensor) -> Tensor:
    """Pad the last axis with zeros to MIN_HEAD_DIM. Returns a contiguous tensor.

    Runs outside the operators, where a compiler can fuse it with the producer of x.
    """
    missing = MIN_HEAD_DIM - x.shape[-1]
    return (F.pad(x, (0, missing)) if missing > 0 else x).contiguous()


def _pad_state(state_NHKV: Tensor | None) -> Tensor | None:
    """Do the same for both head dims of a state, in fp32."""
    if state_NHKV is None:
        return None
    K, V = state_NHKV.shape[-2:]
    state = state_NHKV.float()
    if min(K, V) < MIN_HEAD_DIM:
        state = F.pad(state, (0, max(MIN_HEAD_DIM - V, 0), 0, max(MIN_HEAD_DIM - K, 0)))
    return state.contiguous()


def sum_decay(g: Tensor, packed: Packed, *, reverse: bool = False) -> Tensor:
    """Sum g (B, T, H) or (B, T, H, K) inside each chunk, up to each token.

    The sums are in base 2, which fla's kernels raise to a power. With `reverse`, sum from each
    token to the end of its chunk, in base e: the gradient of the sums.
    """
    scale = None if reverse else 1 / math.log(2)
    return import_fla("fla.ops.utils").chunk_local_cumsum(
        g, chunk_size=CHUNK, reverse=reverse, scale=scale, **packed
    )


# ---- the operators


class ChunkOperator:
    """The kernels of a recurrence as `lt2::<name>`, with its gradient `lt2::<name>_backward`.

        forward(q, k, v, *inputs, packed, **options) -> o, final state, *kept
        backward(q, k, v, *inputs, *matrices, packed, **options)
            -> gradients of q, k, v, *inputs and of the initial state

    inputs    names after q, k, v; the first is "g" if the recurrence decays
    kept      for backward: the summed decay, which replaces g there, if there is a g; then
              `n_matrices` of shape (B, T, H, CHUNK) in `matrix_dtype`, k's dtype if None
    packed    fla's arguments for packed documents; `options` go to every function of fla
    section   options that set the head dims, for error messages
    backward returns None for a missing state and for a constant decay (H,).
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        forward: Callable[..., Tensors],
        backward: Callable[..., Sequence[Tensor | None]],
        *,
        n_matrices: int,
        matrix_dtype: torch.dtype | None = None,
        section: str,
        max_key_dim: int | None = None,
    ):
        self.name, self.section, self.max_key_dim = name, section, max_key_dim
        self.n_matrices, self.matrix_dtype = n_matrices, matrix_dtype
        self.n_inputs, self.decays = 3 + len(inputs), "g" in inputs
        self.forward_kernels, self.backward_kernels = forward, backward
        names = ["q", "k", "v", *inputs]
        rest = "Tensor? state, Tensor? cu_seqlens, float scale"
        n_outputs = 2 + self.decays + n_matrices
        self.forward = _define(name, names, rest, n_outputs, self._forward)
        names += [f"matrix_{i}" for i in range(n_matrices)]
        rest += ", Tensor do, Tensor? dfinal"
        n_outputs = self.n_inputs + 1
        self.backward = _define(f"{name}_backward", names, rest, n_outputs, self._backward)
        self.forward.register_fake(self._fake_forward)
        self.backward.register_fake(self._fake_backward)
        self.forward.register_autograd(self._differentiate, setup_context=self._save)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *others: Tensor,
        scale: float | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence for 16-bit q, k, v on CUDA; `scale` is K**-0.5 if None."""
        K, V = k.shape[-1], v.shape[-1]
        check_fla_inputs(self.name, q, k, v)
        check_head_dims(self.name, self.section, K, V, self.max_key_dim)
        fp32 = [pad_head_dim(x.float()) if x.ndim == 4 else x.float().contiguous() for x in others]
        o, final, *_ = self.forward(
            pad_head_dim(q),
            pad_head_dim(k),
            pad_head_dim(v),
            *fp32,
            _pad_state(state),
            cu_seqlens,
            K**-0.5 if scale is None else scale,
        )
        return o[..., :V], final[..., :K, :V]

    def _forward(self, *args: Any) -> Tensors:
        *tensors, state, cu_seqlens, scale = args
        with torch.cuda.device_of(tensors[0]):
            return self.forward_kernels(
                *tensors,
                packed_arguments(cu_seqlens),
                scale=scale,
                initial_state=state,
                output_final_state=True,
                chunk_size=CHUNK,
            )

    def _fake_forward(self, *args: Any) -> Tensors:
        q, k, v, *others = args[: self.n_inputs]
        B, T, H, V = v.shape
        cu_seqlens, dtype = args[-2], self.matrix_dtype or k.dtype
        n_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final = v.new_empty(n_sequences, H, q.shape[3], V, dtype=torch.float32)
        kept = [torch.empty_like(others[0])] if self.decays else []
        kept += [k.new_empty(B, T, H, CHUNK, dtype=dtype) for _ in range(self.n_matrices)]
        return torch.empty_like(v), final, *kept

    def _backward(self, *args: Any) -> Tensors:
        *tensors, state, cu_seqlens, scale, do, dfinal = args
        q, k, *_ = tensors
        with torch.cuda.device_of(q):
            dq, dk, *grads = self.backward_kernels(
                *tensors,
                packed_arguments(cu_seqlens),
                scale=scale,
                initial_state=state,
                do=do.contiguous(),
                dht=None if dfinal is None else dfinal.contiguous(),
                chunk_size=CHUNK,
            )
        assert dq is not None and dk is not None
        # Some kernels return fp32. An operator cannot return None.
        return dq.to(q.dtype), dk.to(k.dtype), *(q.new_empty(0) if d is None else d for d in grads)

    def _fake_backward(self, *args: Any) -> Tensors:
        given, state = args[: self.n_inputs], args[-5]
        like = [*(x if x.ndim > 1 else None for x in given), state]
        return tuple(given[0].new_empty(0) if x is None else torch.empty_like(x) for x in like)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *given, state, cu_seqlens, ctx.scale = inputs
        _, _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # else zeros of the size of `kept` are allocated
        if self.decays:
            given[DECAY], *kept = kept
        ctx.save_for_backward(*given, *kept, state, cu_seqlens)

    def _differentiate(
        self, ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        *saved, state, cu_seqlens = ctx.saved_tensors
        if do is None and dfinal is None:
            return (None,) * (self.n_inputs + 3)
        if do is None:
            do = torch.zeros_like(saved[2])
        *grads, dstate = self.backward(*saved, state, cu_seqlens, ctx.scale, do, dfinal)
        if self.decays and saved[DECAY].ndim == 1:
            grads[DECAY] = None
        return *grads, None if state is None else dstate, None, None


def _define(
    name: str, tensors: Sequence[str], rest: str, n_outputs: int, function: Callable[..., Tensors]
) -> CustomOpDef:
    arguments = ", ".join(f"Tensor {x}" for x in tensors)
    schema = f"({arguments}, {rest}) -> ({', '.join(['Tensor'] * n_outputs)})"
    return torch.library.custom_op(f"lt2::{name}", function, mutates_args=(), schema=schema)


# ---- tables of packed documents
#
# fla builds tables from cu_seqlens with a sync and caches them by the identity of the tensor, so a
# buffer with new content gets the tables of the old. Ours are built from numbers on the host, once
# for each content, and layers and loops share them.


def _cached_by_content(build: Callable[..., Any]) -> Callable[..., Any]:
    """Cache `build(offsets, device, *options)` for each cu_seqlens until its content changes."""
    tables = WeakIdKeyDictionary()  # cu_seqlens -> (its content, options, table)

    def table(cu_seqlens: Tensor, *options: int) -> Any:
        offsets, known = host_cu_seqlens(cu_seqlens), tables.get(cu_seqlens)
        if known is None or known[0] != offsets or known[1] != options:
            built = build(offsets, cu_seqlens.device, *options)
            known = tables[cu_seqlens] = (offsets, options, built)
        return known[2]

    return table


def _n_chunks(offsets: list[int], chunk_size: int) -> list[int]:
    """Count the chunks of each document."""
    return [-(-(end - start) // chunk_size) for start, end in itertools.pairwise(offsets)]


@_cached_by_content
def _packed_tables(offsets: list[int], device: torch.device) -> Packed:
    indices = [(doc, i) for doc, n in enumerate(_n_chunks(offsets, CHUNK)) for i in range(n)]
    flat = upload(list(itertools.chain(*indices)), device, torch.int32)
    # A copy of cu_seqlens: the original may be overwritten.
    return {"cu_seqlens": upload_cu_seqlens(offsets, device), "chunk_indices": flat.view(-1, 2)}


def packed_arguments(cu_seqlens: Tensor | None) -> Packed:
    """Return fla's arguments for packed documents, {} for None.

    cu_seqlens     (n_docs + 1,) int32
    chunk_indices  (chunks, 2)   int32: document, and index of the chunk in it
    """
    return {} if cu_seqlens is None else _packed_tables(cu_seqlens)


class KnownNumber(int):
    """A number on the host with the `.item()` of a tensor."""

    def item(self) -> int:
        return int(self)


class ChunkOffsets(Tensor):
    """(n_docs + 1,) int64: chunks before each document. The host knows the last, the total."""

    # Without this every operation on it would go through Python.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    n_chunks: int

    def __getitem__(self, index: int) -> KnownNumber:
        assert index == -1, "the other entries are on the device"
        return KnownNumber(self.n_chunks)


@_cached_by_content
def chunk_offsets(offsets: list[int], device: torch.device, chunk_size: int) -> ChunkOffsets:
    """Replace fla's `prepare_chunk_offsets(cu_seqlens, chunk_size)`, which needs a sync."""
    ends = list(itertools.accumulate(_n_chunks(offsets, chunk_size), initial=0))
    table = upload(ends, device, torch.int64).as_subclass(ChunkOffsets)
    table.n_chunks = ends[-1]
    return table
