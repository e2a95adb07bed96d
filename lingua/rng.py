"""Seed the random generators of this process, and save their state as JSON."""

from __future__ import annotations

import base64
import random
import sys
from typing import Any

import torch


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def get_rng_state() -> dict[str, Any]:
    """Return the states of torch (CPU and current GPU), Python, and NumPy if it is imported."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": _to_text(torch.get_rng_state()),
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [kind, keys.tolist(), position, has_gauss, cached]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the generators that are both in `state` and in this process."""
    torch.set_rng_state(_to_tensor(state["torch"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_to_tensor(state["cuda"]))
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None:
        numpy.random.set_state(tuple(state["numpy"]))


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
