"""Muon: a hidden weight matrix moves along its momentum, orthogonalized.

    M <- momentum M + G          U = G + momentum M (Nesterov)
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonalize(U)

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); with the decay, and the factor that
gives an update the RMS of AdamW's, so that both go by one learning rate, of Liu et al. 2025
(Moonlight, https://arxiv.org/abs/2502.16982). Embeddings, head and vectors are AdamW's.

A matrix has to be whole to be orthogonalized. The n ranks that share matrices take n of them at a
time: each is sent the parts of one, and sends back the parts of what it made. Those that data and
tensor parallelism both split are gathered on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.optim import AdamW, Optimizer

from lingua.parallel.tensor_parallel import local_tensor

MOMENTUM_BUFFER = "momentum_buffer"  # a matrix's only state
ADAMW_RMS = 0.2  # of AdamW's updates, as Moonlight measured it
# The quintic a x + b x^3 + c x^5, five times, takes singular values of 0.01 to 1 to 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalize(matrix: Tensor, n_steps: int) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by Newton-Schulz iteration.

    Singular values come out between 0.7 and 1.2, which does for an update. Computed in bf16 on
    CUDA and in fp32 elsewhere; the result has that dtype.
    """
    X = _for_products(matrix)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X  # the Gram matrix of the shorter side is smaller
    X = X / X.norm().clamp(min=1e-7)  # then no singular value exceeds 1
    a, b, c = COEFFICIENTS
    for _ in range(n_steps):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.T if tall else X


def _for_products(matrix: Tensor) -> Tensor:
    return matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)


class Muon(Optimizer):
    """Muon for the groups with `muon: True`, AdamW for the others: one optimizer, one rate.

    With sharded matrices a step is a collective.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        newton_schulz_steps: int,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ):
        """`groups`: params, weight_decay and muon. Their dicts are kept, not copied."""
        self.momentum, self.newton_schulz_steps = momentum, newton_schulz_steps
        others = [group for group in groups if not group["muon"]]
        self.adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__(groups, {"lr": lr})
        self.state = self.adamw.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loss is not computed again"
        for group in self.param_groups:
            if group["muon"]:
                for batch in _batches([p for p in group["params"] if p.grad is not None]):
                    self._move(batch, group["lr"], group["weight_decay"])
        self.adamw.step()

    def _move(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        updates = _orthogonalize_parts(
            params, [self._momentum(p) for p in params], self.newton_schulz_steps
        )
        for param, update in zip(params, updates, strict=True):
            part = local_tensor(param)
            part.mul_(1 - lr * weight_decay)
            part.add_(update.to(part.dtype), alpha=-lr * ADAMW_RMS * math.sqrt(max(param.shape)))

    def _momentum(self, param: nn.Parameter) -> Tensor:
        """U of this rank's part, in the dtype that it is orthogonalized in."""
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if MOMENTUM_BUFFER not in state:
            state[MOMENTUM_BUFFER] = torch.zeros_like(grad)
        momentum = local_tensor(state[MOMENTUM_BUFFER]).mul_(self.momentum).add_(local_tensor(grad))
        return _for_products(local_tensor(grad).add(momentum, alpha=self.momentum))


# ---- matrices in parts


def _split_dims(matrix: Tensor) -> list[int]:
    """Dimensions of its mesh along which ranks hold different parts."""
    if not isinstance(matrix, DTensor):
        return []
    mesh, placements = matrix.device_mesh, matrix.placements
    return [d for d, p in enumerate(placements) if not p.is_replicate() and mesh.size(d) > 1]


def _batches(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Matrices that are exchanged at once: split alike, as many as ranks share them."""
    layouts: dict[Any, list[nn.Parameter]] = {}
    for p in params:
        layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        layouts.setdefault(layout, []).append(p)
    for alike in layouts.values():
        dims, first = _split_dims(alike[0]), alike[0]
        n = first.device_mesh.size(dims[0]) if isinstance(first, DTensor) and len(dims) == 1 else 1
        alike.sort(key=Tensor.numel)  # ranks that wait for each other should have equal work
        yield from (alike[i : i + n] for i in range(0, len(alike), n))


def _orthogonalize_parts(
    params: list[nn.Parameter], parts: list[Tensor], n_steps: int
) -> list[Tensor]:
    """`parts` are this rank's of one matrix for each parameter, and so is the result."""
    dims = _split_dims(params[0])
    if len(dims) == 1:
        return _orthogonalize_in_turn(params, parts, dims[0], n_steps)
    if dims:
        pairs = zip(params, parts, strict=True)
        return [_orthogonalize_everywhere(param, part, n_steps) for param, part in pairs]
    return [orthogonalize(part, n_steps) for part in parts]


def _orthogonalize_in_turn(
    params: list[nn.Parameter], parts: list[Tensor], mesh_dim: int, n_steps: int
) -> list[Tensor]:
    """Rank i of a mesh dimension makes the i-th matrix whole, orthogonalizes it, and splits it."""
    like = params[0]
    assert isinstance(like, DTensor)
    mesh, dim = like.device_mesh, like.placements[mesh_dim].dim  # pyright: ignore
    rank, n, group = mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim), mesh.get_group(mesh_dim)
    # In a last batch there may be no matrix for this rank; then it works on none, of size 0.
    mine = params[rank].shape if rank < len(params) else torch.Size((0, 0))
    pieces = [piece.shape for piece in _split(torch.empty(mine, device="meta"), n, dim)]
    received = [shape.numel() for shape in pieces]
    sent = [part.numel() for part in parts] + [0] * (n - len(parts))

    flat = torch.cat([part.flatten() for part in parts])
    gathered = flat.new_empty(sum(received))
    dist.all_to_all_single(gathered, flat, received, sent, group=group)
    views = [x.view(shape) for x, shape in zip(gathered.split(received), pieces, strict=True)]
    whole = orthogonalize(torch.cat(views, dim), n_steps)
    gathered = torch.cat([piece.flatten() for piece in _split(whole, n, dim)])
    dist.all_to_all_single(flat, gathered, sent, received, group=group)
    return [x.view_as(part) for x, part in zip(flat.split(sent[: len(parts)]), parts, strict=True)]


def _orthogonalize_everywhere(param: nn.Parameter, part: Tensor, n_steps: int) -> Tensor:
    assert isinstance(param, DTensor)
    mesh, placements = param.device_mesh, param.placements
    sharded = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    whole = orthogonalize(sharded.full_tensor(), n_steps)
    # FSDP splits what tensor parallelism has split before, though its mesh dimension comes first.
    for dim in sorted(range(mesh.ndim), key=lambda dim: _is_split_again(placements[dim])):
        placement = placements[dim]
        if not placement.is_replicate():
            pieces = _split(whole, mesh.size(dim), placement.dim)  # pyright: ignore
            whole = pieces[mesh.get_local_rank(dim)]
    return whole


def _is_split_again(placement: Placement) -> bool:
    return getattr(placement, "split_factor", 1) > 1  # torch's _StridedShard


def _split(matrix: Tensor, n: int, dim: int) -> list[Tensor]:
    """n parts as DTensor makes them: the last ones may be short, or empty."""
    parts = list(matrix.chunk(n, dim))
    return parts + [matrix.narrow(dim, 0, 0)] * (n - len(parts))
