"""What the modelling file of an exported folder has instead of definitions of the same names.

It runs in one process, without training, tensor parallelism or probes.
"""

from __future__ import annotations

import importlib.metadata
import logging
import uuid
from functools import cache
from typing import Any

from torch import Tensor, nn

REPLACED = ("lingua.errors", "lingua.parallel.tensor_parallel", "lingua.probe")

# Several folders may be loaded in one process, and an operator is registered once.
OPERATORS = f"lt2_{uuid.uuid4().hex[:12]}::"
FLA = "0.6."  # the versions whose kernels kernel/fla.py calls


class UserError(ValueError):
    """A mistake that the user can fix."""


class TensorParallel:
    """One rank that has all heads and channels."""

    size, rank = 1, 0

    def own(self, x: Tensor) -> Tensor:
        return x

    copy_to = reduce_from = all_reduce = gather_from = all_gather = own


ALONE = TensorParallel()


def local_weight(module: Any) -> Tensor:
    return module.weight


def copy_whole(target: Tensor, whole: Tensor) -> None:
    target.copy_(whole)


def split_linears(module: nn.Module, tp: TensorParallel, **names: Any) -> None:
    raise NotImplementedError("tensor parallelism")


def limit_tuning() -> None:
    """Leave fla's tuning as it is."""


def is_probing() -> bool:
    return False


def log_stats(x: Tensor, name: str) -> Tensor:
    return x


def may_read_weights(linears: tuple[nn.Linear, ...]) -> bool:
    """Whether multiplying by the weights does what calling the layers does.

    It doesn't for layers with an adapter, hooks or quantized weights.
    """
    return all(
        type(linear) is nn.Linear and not linear._forward_hooks and "forward" not in vars(linear)
        for linear in linears
    )


def fla_supports(x: Tensor) -> bool:
    """Whether fla's kernels can run on these 16-bit CUDA tensors. Else the torch form runs."""
    return x.is_cuda and x.dtype.itemsize == 2 and _fla_is_installed()


@cache
def _fla_is_installed() -> bool:
    try:
        version = importlib.metadata.version("flash-linear-attention")
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "no version"
    if version.startswith(FLA):
        return True
    logging.getLogger(__name__).warning(
        "flash-linear-attention %s* and Triton make this model faster on a GPU; %s is installed",
        FLA,
        version,
    )
    return False
