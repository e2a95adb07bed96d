"""Tiny models whose every parameter has an effect, and runs on disk with one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apps.LT2.mixers import MIXERS
from apps.LT2.mixers.attention import BIAS_NAMES
from apps.LT2.mixers.dsa import DSAArgs, LightningIndexer
from apps.LT2.mixers.mamba2 import Mamba2Args
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.checkpoint import CheckpointArgs, CheckpointManager

DSA = DSAArgs(top_k=4, n_index_heads=1, index_head_dim=8)
KINDS: dict[str, dict[str, Any]] = {
    **{mixer: {"mixer": mixer} for mixer in MIXERS},
    "window": {"mixer": "window", "default_sliding_window": 5},
    "mamba2": {"mixer": "mamba2", "mamba2": Mamba2Args(head_dim=16, state_dim=8)},
    "nsa": {
        "mixer": "nsa",
        "n_heads": 16,
        "nsa": NSAArgs(block_size=4, n_blocks=4, window_size=5),
    },
    "hybrid": {"mixer": "gdn", "hybrid_mixer": "full", "attention_pattern": "2:1"},
    "dsa": {"mixer": "dsa", "dsa": DSA},
    "gdn+dsa": {"mixer": "gdn", "hybrid_mixer": "dsa", "attention_pattern": "2:1", "dsa": DSA},
}
# One for each form of cache: a ring of keys; blocks of keys; a state beside keys; index keys.
# What is above the caches is the same for all mixers; test_mixer_caches.py has every mixer.
CACHE_KINDS = ("window", "nsa", "hybrid", "gdn+dsa")


def tiny_args(kind: str, loop_count: int, **changes: Any) -> LoopedTransformerArgs:
    shape: dict[str, Any] = {"dim": 32, "n_layers": 3, "n_heads": 2, "multiple_of": 16}
    options = {"vocab_size": 258, "loop_count": loop_count, **shape, **KINDS[kind], **changes}
    return LoopedTransformerArgs(**options)


def tiny_model(kind: str, loop_count: int, seed: int = 0, **changes: Any) -> LoopedTransformer:
    torch.manual_seed(seed)
    model = LoopedTransformer(tiny_args(kind, loop_count, **changes)).requires_grad_(False)
    model.init_weights()
    for name, param in model.named_parameters():
        if name.endswith(("rho", "exit_gate.weight", "exit_gate.bias", "wg.weight", *BIAS_NAMES)):
            param.normal_(std=0.3)  # initialized to zero, which would hide errors
    model.tok_embeddings.weight *= 4  # outputs then depend on the tokens
    make_choices_clear(model)
    return model


@torch.no_grad()
def make_choices_clear(model: nn.Module) -> None:
    """Change indexers of one head so that rounding doesn't change their choice of keys.

    With index projections of rank one, a key's score is its sign times a function of its distance,
    so two scores of a query are equal or far apart.
    """
    for module in model.modules():
        if isinstance(module, LightningIndexer):
            assert module.n_heads == 1
            for linear in (module.wq, module.wk):
                linear.weight.copy_(linear.weight[:1].expand_as(linear.weight))


class AtStep:
    """The part of a trainer's state that a checkpoint needs."""

    def __init__(self, step: int):
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]


def save_run(dump_dir: Path, model: LoopedTransformer, step: int = 1, **config: Any) -> Path:
    """Make a run's folder with a checkpoint of `step`; return the checkpoint."""
    manager = CheckpointManager(CheckpointArgs(path=str(dump_dir / "checkpoints")))
    config = {"model": asdict(model.args), "data": {"tokenizer": {"name": "bytes"}}} | config
    manager.save(model, None, AtStep(step), config)
    return manager.existing_saves[-1]
