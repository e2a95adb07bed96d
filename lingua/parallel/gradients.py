"""Average gradients over ranks, accumulate them, and clip them.

FSDP averages the gradients of weight matrices, which it shards. All other parameters
(`optim.is_matrix` is false) are replicated. Their gradients are averaged here, in one collective.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lingua.optim import is_matrix
from lingua.parallel.ranks import get_device
from lingua.parallel.tensor_parallel import local_tensor, partial_parameters


def set_gradient_sync(model: nn.Module, sync: bool, *, reshard: bool = True) -> None:
    """Set whether backward averages gradients over ranks, and whether it frees gathered weights.

    `sync` is False for all but the last micro-batch of an optimizer step: gradients then accumulate
    locally. `reshard=False` keeps the gathered weights, which the micro-batches share. Both take
    effect at once, even during a backward.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
        model.set_reshard_after_backward(reshard)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of all FSDP units, in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_backward_prefetch(module: nn.Module, prefetch: bool) -> None:
    """Set whether the backward of `module` gathers the unit that ran before it in the forward."""
    if isinstance(module, FSDPModule):
        # An explicit list replaces that unit. The module itself is gathered already.
        module.set_modules_to_backward_prefetch([] if prefetch else [module])


@torch.no_grad()
def sync_replicated_grads(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Average the gradients of replicated parameters over data-parallel ranks, before clipping.

    Ranks of a TP group have the same gradient, or each a partial sum (see tensor_parallel.py). A
    missing gradient counts as zero, so that all ranks send buffers of the same size. If no rank has
    one, as in a loop that the step does not run, it stays missing, and AdamW skips the parameter.
    """
    if mesh is None or dist.get_world_size() == 1:
        return
    replicated = [
        p for name, p in model.named_parameters() if p.requires_grad and not is_matrix(name, p)
    ]
    if not replicated:
        return
    flags = torch.ones(len(replicated), device=replicated[0].device)
    missing = [i for i, p in enumerate(replicated) if p.grad is None]
    for i in missing:
        replicated[i].grad = torch.zeros_like(replicated[i])
        flags[i].zero_()
    grads = [local_tensor(p.grad) for p in replicated if p.grad is not None]
    bucket = torch.cat([*(g.flatten().float() for g in grads), flags])
    dist.all_reduce(bucket)
    bucket, n_with_grad = bucket.split([len(bucket) - len(flags), len(flags)])
    partial = set(partial_parameters(model))
    n_ranks, n_replicas = mesh.size(), mesh.size() // _tp_size(mesh)
    sums = bucket.split([g.numel() for g in grads])
    for parameter, grad, total in zip(replicated, grads, sums, strict=True):
        grad.copy_(total.view_as(grad) / (n_replicas if parameter in partial else n_ranks))
    if missing:
        for p, n in zip(replicated, n_with_grad.tolist(), strict=True):  # waits for the device
            if not n:
                p.grad = None


def _tp_size(mesh: DeviceMesh) -> int:
    return mesh["tp"].size() if "tp" in (mesh.mesh_dim_names or ()) else 1


@torch.no_grad()
def clip_grad_norm_(weights: nn.Module | Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients in place so that their joint norm is at most `max_norm`.

    With `max_norm` 0 or None, only compute the norm. Returns the norm before clipping, an fp32
    scalar equal on every rank. It is NaN or infinite if any gradient is; then nothing is scaled.
    Sharded and replicated gradients may be mixed.
    """
    parameters = weights.parameters() if isinstance(weights, nn.Module) else weights
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = _total_norm(grads)
    if max_norm:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        # A NaN scale would hide which gradient was NaN.
        scale = torch.where(norm.isfinite(), scale, 1.0)
        if grads:
            torch._foreach_mul_([local_tensor(grad) for grad in grads], scale)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    """Sum squares over this rank's shards, then over the ranks that hold the other shards."""
    parts: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for grad in grads:
        parts.setdefault(_shard_groups(grad), []).append(local_tensor(grad))
    if not parts:
        return torch.zeros((), device=get_device())
    total = torch.zeros((), device=grads[0].device, dtype=torch.float32)
    for groups, tensors in parts.items():
        squares = torch.nn.utils.get_total_norm(tensors).float().square()
        for group in groups:
            dist.all_reduce(squares, group=group)
        total += squares
    return total.sqrt()


def _shard_groups(grad: Tensor) -> tuple[dist.ProcessGroup, ...]:
    if not isinstance(grad, DTensor):
        return ()
    assert not any(p.is_partial() for p in grad.placements), "a gradient was not reduced"
    return tuple(
        grad.device_mesh.get_group(dim)
        for dim, placement in enumerate(grad.placements)
        if not placement.is_replicate() and grad.device_mesh.size(dim) > 1
    )
