"""Tensor parallelism: every rank of a mesh dimension computes its own part of a layer's channels.

    x  -- copy to -->  wq, wk, wv, w1, ..: own outputs .. wo, w2: own inputs  -- reduce from -->  y

Outside, activations are whole and the same on all ranks. Inside, a rank has its own heads or
channels, so the gradient of what they all read is a sum over ranks: `copy_to` takes it for x, and
`gradients.sync_replicated_grads` for the vectors of modules with a `tp` (`partial_parameters`). A
pair of matrices costs one all-reduce forward and one backward, as in Megatron-LM
(https://arxiv.org/abs/1909.08053). So does the vocabulary, of which a rank has its own pieces:
forward for the embedding, backward for what the head reads.

Split matrices are DTensors, whole to a checkpoint and to an optimizer. Vectors stay whole on every
rank, which reads its part of them (`own`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lingua.errors import UserError

OUTPUTS, INPUTS = 0, 1  # dimensions of a weight (out, in)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor (DTensor); any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor that every rank holds whole into `target`, in place; a DTensor gets its part.

    Nothing is sent: each rank cuts its part from its own copy.
    """
    if isinstance(target, DTensor):
        whole = distribute_tensor(
            whole.to(target.to_local().device),
            target.device_mesh,
            target.placements,
            src_data_rank=None,
        )
    local_tensor(target).copy_(local_tensor(whole))


class TensorParallel:
    """This rank's place in a 1-D mesh, and the sums over it; without a mesh it is alone."""

    def __init__(self, mesh: DeviceMesh | None = None):
        self.mesh, self.size, self.rank, self.group = mesh, 1, 0, ""
        if mesh is not None:
            group = mesh.get_group()
            self.size, self.rank, self.group = mesh.size(), mesh.get_local_rank(), group.group_name
            _groups[self.group] = group

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor along its first dimension."""
        return whole if self.size == 1 else whole.chunk(self.size)[self.rank]

    def copy_to(self, x: Tensor) -> Tensor:
        """Return x; the backward all-reduces the gradient."""
        return x if self.size == 1 else _CopyTo.apply(x, self.group)  # pyright: ignore

    def reduce_from(self, x: Tensor) -> Tensor:
        """All-reduce x; the backward returns the gradient, which is the same on all ranks."""
        return x if self.size == 1 else _ReduceFrom.apply(x, self.group)  # pyright: ignore

    def all_reduce(self, x: Tensor) -> Tensor:
        """All-reduce x and its gradient: each rank computes something else with the sum."""
        return self.copy_to(self.reduce_from(x))

    def gather_from(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' x along the last dimension.

        The backward keeps this rank's part of the gradient, which is the same on all ranks.
        """
        if self.size == 1:
            return x
        return _GatherFrom.apply(x, self.group, self.size, self.rank)  # pyright: ignore

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' x along the last dimension; each computes something else with it.

        The backward sums the gradients and keeps this rank's part.
        """
        # The tensor is narrow: a reduce-scatter would save little.
        return self.copy_to(self.gather_from(x))


# ---- collectives. Operators of our own, since a compiled block can hold a name and no mesh or
# group, and selective recomputation has to know them.

_groups: dict[str, dist.ProcessGroup] = {}
# Torch 2.13 has another name for it, and warns of the old one.
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@torch.library.custom_op("lingua::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_groups[group])
    return total


@_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("lingua::all_gather", mutates_args=())
def _all_gather(x: Tensor, group: str, size: int) -> Tensor:
    """Joined along the last dimension."""
    stacked = x.new_empty(size * x.shape[0], *x.shape[1:])
    _gather_into(stacked, x.contiguous(), group=_groups[group])
    return torch.cat(stacked.chunk(size), dim=-1)


@_all_gather.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], size * x.shape[-1])


def collectives() -> set[Any]:
    """What recomputation should not repeat."""
    return {torch.ops.lingua.all_reduce.default, torch.ops.lingua.all_gather.default}


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int, rank: int) -> Tensor:
        ctx.size, ctx.rank = size, rank
        return _all_gather(x, group, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].chunk(ctx.size, dim=-1)[ctx.rank], None, None, None


# ---- layers

ALONE = TensorParallel()


class SplitLinear(nn.Linear):
    """A rank's part of a bias-free linear layer: of its outputs, or of the sum over its inputs.

    `in_features` and `out_features` are this rank's; `weight` is a DTensor of the whole matrix.
    """

    def __init__(self, whole: nn.Linear, tp: TensorParallel, dim: int):
        nn.Module.__init__(self)
        assert whole.bias is None
        self.tp, self.dim = tp, dim
        self.weight = _split_weight(whole.weight, tp, dim)
        self.register_parameter("bias", None)
        self.out_features, self.in_features = local_weight(self).shape
        self.part: Tensor | None = None  # of the weight, for compiled code

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, local_weight(self))
        return self.tp.reduce_from(y) if self.dim == INPUTS else y


class SplitEmbedding(nn.Embedding):
    """A rank's own pieces of an embedding: as many rows for each rank, one rank after the other.

    `num_embeddings` is this rank's; `weight` is a DTensor of the whole matrix. A token outside of
    the vocabulary fails on every rank, as in nn.Embedding: IndexError, or on CUDA an assert there.
    """

    def __init__(self, whole: nn.Embedding, tp: TensorParallel):
        nn.Module.__init__(self)
        assert whole.padding_idx is None and whole.max_norm is None
        self.tp = tp
        self.weight = _split_weight(whole.weight, tp, OUTPUTS)
        self.num_embeddings, self.embedding_dim = local_weight(self).shape

    def forward(self, input: Tensor) -> Tensor:
        rows = self.num_embeddings
        # Beyond the last rank's rows, or before the first one's, there is none to look up.
        owner = input.div(rows, rounding_mode="floor").clamp(0, self.tp.size - 1)
        # A piece of another rank looks up any row, and what it found there is dropped.
        found = F.embedding(input - owner * rows, local_weight(self))
        is_own = owner == self.tp.rank
        return self.tp.reduce_from(found.masked_fill(~is_own[..., None], 0))


def _split_weight(whole: Tensor, tp: TensorParallel, dim: int) -> nn.Parameter:
    assert tp.mesh is not None
    assert whole.shape[dim] % tp.size == 0, "whether it divides is checked before the split"
    # src_data_rank=None: every rank cuts its own copy, nothing is sent.
    weight = distribute_tensor(whole, tp.mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(weight, requires_grad=whole.requires_grad)


def local_weight(module: nn.Linear | nn.Embedding) -> Tensor:
    """What this rank computes with: its part of a split weight, else the weight."""
    if not isinstance(module, (SplitLinear, SplitEmbedding)):
        return module.weight
    if torch.compiler.is_compiling():
        assert isinstance(module, SplitLinear) and module.part is not None, (
            "hold_parts comes before compiled code"
        )
        return module.part
    assert isinstance(module.weight, DTensor)
    return module.weight.to_local()


def tp_of(module: nn.Module) -> TensorParallel:
    """The ranks that share a layer."""
    return getattr(module, "tp", ALONE)


def find_split_linears(module: nn.Module) -> list[SplitLinear]:
    return [child for child in module.modules() if isinstance(child, SplitLinear)]


def hold_parts(linears: list[SplitLinear]) -> None:
    """To be called before compiled code: torch 2.13 cannot compile the backward of `to_local`."""
    for linear in linears:
        assert isinstance(linear.weight, DTensor)
        # Past nn.Module's own, which would take it for a parameter.
        object.__setattr__(linear, "part", linear.weight.to_local())


def split_linears(
    module: nn.Module, tp: TensorParallel, *, outputs: tuple[str, ...], inputs: tuple[str, ...]
) -> None:
    """Replace linear layers of `module`, by attribute, by this rank's part of them, and copy
    `module`'s input to the group."""
    for names, dim in ((outputs, OUTPUTS), (inputs, INPUTS)):
        for name in names:
            linear = getattr(module, name)
            if linear is not None:  # a layer that the config leaves out
                setattr(module, name, SplitLinear(linear, tp, dim))
    module.register_forward_pre_hook(lambda _, args: (tp.copy_to(args[0]), *args[1:]))


def check_divides(tp_size: int, count: int, what: str) -> None:
    """UserError unless `tp_size` divides `count`; `what` names the option and its meaning."""
    if count % tp_size:
        raise UserError(
            f"distributed.tp_size={tp_size} does not divide {what}, {count}; "
            "use a tp_size that does, or distributed.fsdp_type=full_shard for memory"
        )


def partial_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those of modules with a `tp`. Each rank reads its own part of their vectors, or uses them for
    its own heads, so that the gradients are parts of a sum over the ranks."""
    for module in model.modules():
        if tp_of(module).size > 1:
            yield from module.parameters()
