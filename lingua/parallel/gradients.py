"""Gradients between backward and optimizer step: averaged over ranks, accumulated, clipped.

FSDP averages the gradients of the matrices that it shards. Vectors (`optim.is_matrix` is false) are
whole on every rank and unknown to FSDP; their gradients are averaged here, in one collective.
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
from lingua.parallel.tensor_parallel import local_tensor, partial_parameters


def set_gradient_sync(model: nn.Module, sync: bool, *, reshard: bool = True) -> None:
    """Whether backward averages gradients over ranks, or only adds to local ones; and whether it
    frees a unit's gathered weights once it is through with the unit.

    `sync` is False for all micro-batches of an optimizer step but the last. Weights do not change
    between them, so without `reshard` they need not be gathered again. Takes effect at once, in the
    middle of a backward too.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
        model.set_reshard_after_backward(reshard)


@torch.no_grad()
def sync_replicated_grads(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Average the gradients of vectors over the data-parallel ranks; call it once, before clipping.

    Tensor-parallel ranks have the same gradient, or each a part of it (see tensor_parallel). A
    vector without a gradient here counts as zero, so that all ranks send the same numbers.
    """
    if mesh is None or dist.get_world_size() == 1:
        return
    vectors = [
        p for name, p in model.named_parameters() if p.requires_grad and not is_matrix(name, p)
    ]
    if not vectors:
        return
    for p in vectors:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [local_tensor(p.grad) for p in vectors if p.grad is not None]
    bucket = torch.cat([g.flatten().float() for g in grads])
    dist.all_reduce(bucket)
    parts = set(partial_parameters(model))
    n_ranks, n_replicas = mesh.size(), mesh.size() // _tp_size(mesh)
    sums = bucket.split([g.numel() for g in grads])
    for vector, grad, total in zip(vectors, grads, sums, strict=True):
        grad.copy_(total.view_as(grad) / (n_replicas if vector in parts else n_ranks))


def _tp_size(mesh: DeviceMesh) -> int:
    return mesh["tp"].size() if "tp" in (mesh.mesh_dim_names or ()) else 1


@torch.no_grad()
def clip_grad_norm_(weights: nn.Module | Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients of these parameters, or of a whole module's, so that their joint norm is
    at most `max_norm`; 0 or None only measures.

    Returns the norm before clipping, an fp32 scalar equal on every rank; NaN or infinite if any
    gradient is. Sharded and whole gradients may be mixed.
    """
    parameters = weights.parameters() if isinstance(weights, nn.Module) else weights
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = _total_norm(grads)
    if max_norm:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        # Scaled by a NaN, all gradients would be NaN, and the one that was could not be named.
        scale = torch.where(norm.isfinite(), scale, 1.0)
        for grad in grads:
            local_tensor(grad).mul_(scale)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The norm over all parts: those of this rank, then those that other ranks hold."""
    parts: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for grad in grads:
        parts.setdefault(_groups_holding_parts(grad), []).append(local_tensor(grad))
    if not parts:
        return torch.zeros(())
    total = torch.zeros((), device=grads[0].device, dtype=torch.float32)
    for groups, tensors in parts.items():
        squares = torch.nn.utils.get_total_norm(tensors).float().square()
        for group in groups:
            dist.all_reduce(squares, group=group)
        total += squares
    return total.sqrt()


def _groups_holding_parts(grad: Tensor) -> tuple[dist.ProcessGroup, ...]:
    if not isinstance(grad, DTensor):
        return ()
    assert not any(p.is_partial() for p in grad.placements), "a gradient was not reduced"
    return tuple(
        grad.device_mesh.get_group(dim)
        for dim, placement in enumerate(grad.placements)
        if not placement.is_replicate()
    )
