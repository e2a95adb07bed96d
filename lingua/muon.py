"""Muon: move each hidden weight matrix along its orthogonalized momentum.

    M <- momentum M + G          U = G + momentum M (Nesterov)
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonalize(U)

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). Weight decay and the scale follow
Liu et al. 2025 (Moonlight, https://arxiv.org/abs/2502.16982): updates have the RMS of AdamW's, so
both optimizers share one learning rate. AdamW updates embeddings, head and all non-matrices.

Orthogonalization needs the whole matrix. The n ranks that shard matrices process n matrices at a
time: an all-to-all gives each rank one whole matrix, and a second one returns the shards. If data
and tensor parallelism both shard a matrix, every rank gathers and orthogonalizes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from lingua.parallel.tensor_parallel import local_tensor

MOMENTUM_BUFFER = "momentum_buffer"  # the only state of a matrix
ADAMW_RMS = 0.2  # of AdamW's updates, measured by Moonlight
# Five steps of a x + b x^3 + c x^5 map singular values of 0.01 to 1 to 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalize(matrix: Tensor, n_steps: int) -> Tensor:
    """Approximate U V^T of the SVD U S V^T by Newton-Schulz iteration.

    Singular values of the result lie between 0.7 and 1.2, which is enough for an update. Its dtype
    is bf16 on CUDA and fp32 elsewhere, and so is the computation.
    """
    X = _to_compute_dtype(matrix)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X  # the Gram matrix of the shorter side is smaller
    X = X / X.norm().clamp(min=1e-7)  # now no singular value exceeds 1
    a, b, c = COEFFICIENTS
    for _ in range(n_steps):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.T if tall else X


def _to_compute_dtype(matrix: Tensor) -> Tensor:
    return matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)


class Muon(Optimizer):
    """Muon for the groups with `muon: True`, AdamW for the others, with one learning rate.

    If parameters are sharded, a step is a collective.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        adamw: AdamW,
        *,
        momentum: float,
        newton_schulz_steps: int,
    ):
        """`groups` have params, weight_decay and muon. `adamw` shares the dicts without muon."""
        self.momentum, self.newton_schulz_steps = momentum, newton_schulz_steps
        self.adamw = adamw
        super().__init__(groups, {"lr": adamw.defaults["lr"]})
        self.state = self.adamw.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "Muon does not recompute the loss"
        for group in self.param_groups:
            if group["muon"]:
                for batch in _batches([p for p in group["params"] if p.grad is not None]):
                    self._update(batch, group["lr"], group["weight_decay"])
        self.adamw.step()

    def _update(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        updates = _orthogonalize_shards(
            params, [self._momentum(p) for p in params], self.newton_schulz_steps
        )
        for param, update in zip(params, updates, strict=True):
            shard = local_tensor(param)
            shard.mul_(1 - lr * weight_decay)
            shard.add_(update.to(shard.dtype), alpha=-lr * ADAMW_RMS * math.sqrt(max(param.shape)))

    def _momentum(self, param: nn.Parameter) -> Tensor:
        """Update the momentum; return this rank's shard of U, in the compute dtype."""
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if MOMENTUM_BUFFER not in state:
            state[MOMENTUM_BUFFER] = torch.zeros_like(grad)
        momentum = local_tensor(state[MOMENTUM_BUFFER]).mul_(self.momentum).add_(local_tensor(grad))
        return _to_compute_dtype(local_tensor(grad).add(momentum, alpha=self.momentum))


# ---- sharded matrices


def _sharded_dims(matrix: Tensor) -> list[int]:
    """Return the mesh dimensions over which ranks hold different shards."""
    if not isinstance(matrix, DTensor):
        return []
    mesh, placements = matrix.device_mesh, matrix.placements
    return [d for d, p in enumerate(placements) if not p.is_replicate() and mesh.size(d) > 1]


def _batches(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield matrices to exchange together: equally sharded, one for each rank that shares them."""
    layouts: dict[Any, list[nn.Parameter]] = {}
    for p in params:
        layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        layouts.setdefault(layout, []).append(p)
    for group in layouts.values():
        dims, first = _sharded_dims(group[0]), group[0]
        n = first.device_mesh.size(dims[0]) if isinstance(first, DTensor) and len(dims) == 1 else 1
        group.sort(key=Tensor.numel)  # ranks wait for each other, so give them equal work
        yield from (group[i : i + n] for i in range(0, len(group), n))


def _orthogonalize_shards(
    params: list[nn.Parameter], shards: list[Tensor], n_steps: int
) -> list[Tensor]:
    """Return this rank's shards of the orthogonalized matrices, given its `shards` of them."""
    dims = _sharded_dims(params[0])
    if len(dims) == 1:
        return _orthogonalize_one_per_rank(params, shards, dims[0], n_steps)
    if dims:
        pairs = zip(params, shards, strict=True)
        return [_orthogonalize_on_every_rank(param, shard, n_steps) for param, shard in pairs]
    return [orthogonalize(shard, n_steps) for shard in shards]


def _orthogonalize_one_per_rank(
    params: list[nn.Parameter], shards: list[Tensor], mesh_dim: int, n_steps: int
) -> list[Tensor]:
    """Gather the i-th matrix on rank i of a mesh dimension, orthogonalize it, return the shards."""
    like = params[0]
    assert isinstance(like, DTensor)
    mesh, dim = like.device_mesh, like.placements[mesh_dim].dim  # pyright: ignore
    rank, n, group = mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim), mesh.get_group(mesh_dim)
    # The last batch may have no matrix for this rank, which then works on an empty one.
    own_shape = params[rank].shape if rank < len(params) else torch.Size((0, 0))
    shapes = [shard.shape for shard in _split(torch.empty(own_shape, device="meta"), n, dim)]
    received = [shape.numel() for shape in shapes]
    sent = [shard.numel() for shard in shards] + [0] * (n - len(shards))

    flat = torch.cat([shard.flatten() for shard in shards])
    gathered = flat.new_empty(sum(received))
    dist.all_to_all_single(gathered, flat, received, sent, group=group)
    views = [x.view(shape) for x, shape in zip(gathered.split(received), shapes, strict=True)]
    whole = orthogonalize(torch.cat(views, dim), n_steps)
    gathered = torch.cat([shard.flatten() for shard in _split(whole, n, dim)])
    dist.all_to_all_single(flat, gathered, sent, received, group=group)
    results = flat.split(sent[: len(shards)])
    return [x.view_as(shard) for x, shard in zip(results, shards, strict=True)]


def _split(matrix: Tensor, n: int, dim: int) -> list[Tensor]:
    """Split into n shards as DTensor does: the last ones may be short or empty."""
    shards = list(matrix.chunk(n, dim))
    return shards + [matrix.narrow(dim, 0, 0)] * (n - len(shards))


def _orthogonalize_on_every_rank(param: nn.Parameter, shard: Tensor, n_steps: int) -> Tensor:
    assert isinstance(param, DTensor)
    mesh, placements = param.device_mesh, param.placements
    sharded = DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    whole = orthogonalize(sharded.full_tensor(), n_steps)
    # src_data_rank=None: every rank cuts its own copy, without communication.
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
