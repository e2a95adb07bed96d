"""Tensor parallelism: each rank of a mesh dimension computes a part of every layer's channels.

    x  -- copy to -->  wq, wk, wv, w1, ..: own outputs .. wo, w2: own inputs  -- reduce from -->  y

Outside, activations are replicated. Inside, a rank has its own heads or channels. The gradient of a
shared input is then a sum over ranks: `copy_to` reduces it for x, and
`gradients.sync_replicated_grads` for the replicated parameters of modules with a `tp`
(`partial_parameters`). A pair of weight matrices costs one all-reduce forward and one backward, as
in Megatron-LM (https://arxiv.org/abs/1909.08053). A split vocabulary costs one forward, for the
embedding, and one backward, for the input of the head.

Split weights are DTensors, so checkpoints and optimizers see whole matrices. All other parameters
are replicated, and each rank reads its part of them (`own`).
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
    """Return this rank's shard of a DTensor, and any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copy the full tensor `whole` into `target`, in place.

    A DTensor gets its shard. Every rank must have `whole`, because nothing is communicated.
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
    """A TP group: this rank's position in a 1-D mesh, and collectives over it.

    Without a mesh the size is 1, and every method returns its input.
    """

    def __init__(self, mesh: DeviceMesh | None = None):
        self.mesh, self.size, self.rank, self.group = mesh, 1, 0, ""
        if mesh is not None:
            group = mesh.get_group()
            self.size, self.rank, self.group = mesh.size(), mesh.get_local_rank(), group.group_name
            _groups[self.group] = group

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor, split along its first dimension."""
        return whole if self.size == 1 else whole.chunk(self.size)[self.rank]

    def copy_to(self, x: Tensor) -> Tensor:
        """Return x; the backward all-reduces the gradient."""
        return x if self.size == 1 else _CopyTo.apply(x, self.group)  # pyright: ignore

    def reduce_from(self, x: Tensor) -> Tensor:
        """All-reduce x. The backward passes the gradient, which is the same on all ranks."""
        return x if self.size == 1 else _ReduceFrom.apply(x, self.group)  # pyright: ignore

    def all_reduce(self, x: Tensor) -> Tensor:
        """All-reduce x, and its gradient, because ranks use the sum differently."""
        return self.copy_to(self.reduce_from(x))

    def gather_from(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' x along the last dimension.

        The backward keeps this rank's part of the gradient, which is the same on all ranks.
        """
        if self.size == 1:
            return x
        return _GatherFrom.apply(x, self.group, self.size, self.rank)  # pyright: ignore

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' x along the last dimension, for ranks that use it differently.

        The backward sums the gradients and keeps this rank's part.
        """
        # The tensors are small, so a reduce-scatter would save little.
        return self.copy_to(self.gather_from(x))


# ---- collectives. They are custom operators, because a compiled block can refer to a group by name
# only, and because selective activation checkpointing lists operators.

_groups: dict[str, dist.ProcessGroup] = {}
# torch 2.13 renames it and warns about the old name.
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
    """Concatenate along the last dimension."""
    stacked = x.new_empty(size * x.shape[0], *x.shape[1:])
    _gather_into(stacked, x.contiguous(), group=_groups[group])
    return torch.cat(stacked.chunk(size), dim=-1)


@_all_gather.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], size * x.shape[-1])


def collectives() -> set[Any]:
    """Return the operators that selective activation checkpointing must not recompute."""
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
    """A linear layer split by outputs (`dim` 0) or by inputs (`dim` 1).

    `in_features` and `out_features` are local sizes. `weight` is a DTensor of the full matrix. A
    bias stays whole.
    """

    def __init__(self, whole: nn.Linear, tp: TensorParallel, dim: int):
        nn.Module.__init__(self)
        self.tp, self.dim = tp, dim
        self.weight = _split_weight(whole.weight, tp, dim)
        self.bias = whole.bias
        self.out_features, self.in_features = local_weight(self).shape
        self.shard: Tensor | None = None  # of the weight, for compiled code

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.type_as(input)
        if self.dim == OUTPUTS:
            return F.linear(input, local_weight(self), None if bias is None else self.tp.own(bias))
        y = self.tp.reduce_from(F.linear(input, local_weight(self)))
        return y if bias is None else y + bias


class SplitEmbedding(nn.Embedding):
    """An embedding split by tokens: each rank has an equal, consecutive range of rows.

    `num_embeddings` is the local size. `weight` is a DTensor of the full matrix. A token outside
    the vocabulary fails on every rank as in nn.Embedding: IndexError, or a device assert on CUDA.
    """

    def __init__(self, whole: nn.Embedding, tp: TensorParallel):
        nn.Module.__init__(self)
        assert whole.padding_idx is None and whole.max_norm is None
        self.tp = tp
        self.weight = _split_weight(whole.weight, tp, OUTPUTS)
        self.num_embeddings, self.embedding_dim = local_weight(self).shape

    def forward(self, input: Tensor) -> Tensor:
        rows = self.num_embeddings
        # clamp: a token outside the vocabulary must fail in the lookup below.
        owner = input.div(rows, rounding_mode="floor").clamp(0, self.tp.size - 1)
        # Tokens of other ranks look up an arbitrary row, which is masked.
        found = F.embedding(input - owner * rows, local_weight(self))
        is_own = owner == self.tp.rank
        return self.tp.reduce_from(found.masked_fill(~is_own[..., None], 0))


def _split_weight(whole: Tensor, tp: TensorParallel, dim: int) -> nn.Parameter:
    assert tp.mesh is not None
    assert whole.shape[dim] % tp.size == 0, "check_divides comes before the split"
    # src_data_rank=None: every rank slices its own copy, without communication.
    weight = distribute_tensor(whole, tp.mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(weight, requires_grad=whole.requires_grad)


def local_weight(module: nn.Linear | nn.Embedding) -> Tensor:
    """Return this rank's shard of a split weight, or the whole weight of another layer."""
    if not isinstance(module, (SplitLinear, SplitEmbedding)):
        return module.weight
    if torch.compiler.is_compiling():
        assert isinstance(module, SplitLinear) and module.shard is not None, "call hold_shards"
        return module.shard
    return local_tensor(module.weight)


def tp_of(module: nn.Module) -> TensorParallel:
    """Return the TP group of a layer."""
    return getattr(module, "tp", ALONE)


def find_split_linears(module: nn.Module) -> list[SplitLinear]:
    return [child for child in module.modules() if isinstance(child, SplitLinear)]


def hold_shards(linears: list[SplitLinear]) -> None:
    """Store each layer's shard. torch 2.13 cannot compile the backward of `to_local`."""
    for linear in linears:
        assert isinstance(linear.weight, DTensor)
        # nn.Module.__setattr__ would register it as a parameter.
        object.__setattr__(linear, "shard", linear.weight.to_local())


def split_linears(
    module: nn.Module, tp: TensorParallel, *, outputs: tuple[str, ...], inputs: tuple[str, ...]
) -> None:
    """Split linear layers of `module` in place, and copy its input to the TP group.

    The attributes in `outputs` are split by their outputs, those in `inputs` by their inputs. An
    attribute may be None.
    """
    for names, dim in ((outputs, OUTPUTS), (inputs, INPUTS)):
        for name in names:
            linear = getattr(module, name)
            if linear is not None:
                setattr(module, name, SplitLinear(linear, tp, dim))
    module.register_forward_pre_hook(lambda _, args: (tp.copy_to(args[0]), *args[1:]))


def check_divides(tp_size: int, count: int, what: str) -> None:
    """Raise UserError unless `tp_size` divides `count`. `what` names the option and its meaning."""
    if count % tp_size:
        raise UserError(
            f"distributed.tp_size={tp_size} must divide {what}, {count}; "
            "use a tp_size that does, or distributed.fsdp_type=full_shard to save memory"
        )


def partial_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of modules with a TP group, whose gradients are partial sums.

    Each rank uses its own part of a replicated parameter, or all of it for its own heads. The bias
    of a layer that is split by inputs is added to the sum over ranks, so its gradient is whole.
    """
    whole = {linear.bias for linear in find_split_linears(model) if linear.dim == INPUTS}
    for module in model.modules():
        if tp_of(module).size > 1:
            yield from (parameter for parameter in module.parameters() if parameter not in whole)
