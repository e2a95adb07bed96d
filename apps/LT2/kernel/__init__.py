"""Operators of the mixers, one folder each; import them from `<op>/__init__.py` only.

An operator picks the fastest form for its tensors: fla's kernels or our Triton kernels on CUDA,
plain torch elsewhere. `naive.py` is its definition, README.md the math. Only this package imports
fla and Triton; every module also imports without them.
"""

from __future__ import annotations

import importlib.util
import re

import torch

from lingua.errors import UserError

# Older versions compute wrong gradients of gated linear attention, and fla refuses them:
# https://github.com/fla-org/flash-linear-attention/pull/983
MIN_TRITON_HOPPER = (3, 7, 1)


def check_gpu_stack() -> None:
    """Raise UserError at start-up if fla or Triton is missing or too old for this GPU.

    Does nothing without CUDA. Does not import fla, which takes seconds.
    """
    if not torch.cuda.is_available():
        return
    for package in ("triton", "fla"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"model.mixer, model.attention_pattern: all but full, window, nsa and dsa need the "
                f"package {package} on CUDA, and it is not installed: pip install -e '.[gpu]'"
            )
    hopper = torch.cuda.get_device_capability()[0] == 9
    if hopper and _triton_version() < MIN_TRITON_HOPPER:
        want, have = (".".join(map(str, v)) for v in (MIN_TRITON_HOPPER, _triton_version()))
        raise UserError(
            f"Triton {have} computes wrong gradients of gated linear attention on Hopper GPUs; "
            f"Triton {want} or newer is needed: pip install 'triton>={want}' (torch 2.13 brings it)"
        )


def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:3])
