"""Operators of the mixers, one folder each: `<op>/__init__.py` is the only door to an operator.

A door takes what is fastest on the tensors it is given: fla's kernels or our own Triton on CUDA,
plain torch elsewhere. `naive.py` beside it is the definition, and README.md the math. Only this
package imports fla or Triton, and only once CUDA tensors arrive: everything imports without them.
"""

from __future__ import annotations

import importlib.util
import re

import torch

from lingua.errors import UserError

MIN_TRITON_HOPPER = (3, 7, 1)  # the gated chunk backward was wrong before; fla refuses it


def check_gpu_stack() -> None:
    """Refuse at start-up what would fail at the first kernel or, worse, at the first backward.

    Without CUDA there is nothing to check. fla is looked for, not imported: that takes seconds.
    """
    if not torch.cuda.is_available():
        return
    for package in ("triton", "fla"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"model.mixer, model.attention_pattern: all but full, window and dsa need the "
                f"package {package} on CUDA, which is not installed: pip install -e '.[gpu]'"
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
