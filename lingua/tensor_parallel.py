"""Tensor parallelism: every rank of a mesh dimension computes its own part of a layer's channels.

    x  -- enter -->  wq, wk, wv, w1, ..: own outputs  ...  wo, w2: own inputs  -- leave -->  y

Outside, activations are whole and the same on all ranks. Inside, a rank has its own heads or
channels, so the gradient of what they all read is a sum over ranks: `enter` takes it for x, and
`gradients.sync_replicated_grads` for the vectors of modules with a `tp` (`partial_parameters`). A
pair of matrices costs one all-reduce forward and one backward, as in Megatron-LM
(https://arxiv.org/abs/1909.08053).

Split matrices are DTensors, whole to a checkpoint and to an optimizer. Vectors stay whole on every
rank, which reads its part of them (`own`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lingua.args import UserError

OUTPUTS, INPUTS = 0, 1  # dimensions of a weight (out, in)


class TensorParallel:
    """This rank's place in a 1-D mesh, and the sums over it; without a mesh it is alone."""

    def __init__(self, mesh: DeviceMesh | None = None):
        self.mesh = mesh
        self.size = 1 if mesh is None else mesh.size()
        self.rank = 0 if mesh is None else mesh.get_local_rank()

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor along its first dimension."""
        return whole if self.size == 1 else whole.chunk(self.size)[self.rank]

    def enter(self, x: Tensor) -> Tensor:
        """x; backward, the sum of all ranks' gradients."""
        if self.mesh is None:
            return x
        return _from_local(x, self.mesh, Replicate()).to_local(grad_placements=[Partial()])

    def leave(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x; backward, the gradient as it is: it is the same on all."""
        if self.mesh is None:
            return x
        return (
            _from_local(x, self.mesh, Partial()).redistribute(placements=[Replicate()]).to_local()
        )

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, for each to go on with by itself; backward, that sum, too."""
        return self.enter(self.leave(x))

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x, joined along the last dimension, for each to go on with by itself;
        backward, this rank's part of the sum of all gradients."""
        if self.mesh is None:
            return x
        joined = _from_local(x, self.mesh, Shard(x.ndim - 1)).redistribute(placements=[Replicate()])
        return joined.to_local(grad_placements=[Partial()])


def _from_local(x: Tensor, mesh: DeviceMesh, placement: Replicate | Partial | Shard) -> DTensor:
    return DTensor.from_local(x, mesh, [placement], run_check=False)


ALONE = TensorParallel()


class SplitLinear(nn.Linear):
    """A rank's part of a bias-free linear layer: of its outputs, or of the sum over its inputs.

    `in_features` and `out_features` are this rank's; `weight` is a DTensor of the whole matrix.
    """

    def __init__(self, whole: nn.Linear, tp: TensorParallel, dim: int):
        nn.Module.__init__(self)
        assert tp.mesh is not None and whole.bias is None
        assert whole.weight.shape[dim] % tp.size == 0, "check_divides comes before the split"
        self.tp, self.dim = tp, dim
        # src_data_rank=None: every rank cuts its own copy, nothing is sent.
        weight = distribute_tensor(whole.weight, tp.mesh, [Shard(dim)], src_data_rank=None)
        self.weight = nn.Parameter(weight, requires_grad=whole.weight.requires_grad)
        self.register_parameter("bias", None)
        self.out_features, self.in_features = weight.to_local().shape

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, local(self.weight))
        return self.tp.leave(y) if self.dim == INPUTS else y


def local(weight: Tensor) -> Tensor:
    """What this rank computes with: its part of a split weight, else the weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def split_linears(
    module: nn.Module, tp: TensorParallel, *, outputs: tuple[str, ...], inputs: tuple[str, ...]
) -> None:
    """Replace linear layers of `module`, by attribute, by this rank's part of them, and let what
    `module` is called with enter."""
    for names, dim in ((outputs, OUTPUTS), (inputs, INPUTS)):
        for name in names:
            linear = getattr(module, name)
            if linear is not None:  # a layer that the config leaves out
                setattr(module, name, SplitLinear(linear, tp, dim))
    module.register_forward_pre_hook(lambda _, args: (tp.enter(args[0]), *args[1:]))


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
        tp = getattr(module, "tp", ALONE)
        if isinstance(tp, TensorParallel) and tp.size > 1:
            yield from module.parameters()
