"""Looped models of every kind, and prompts for them.

Shapes: B sequences, T tokens. Gates are moved off their initial zero, or they would hide the loops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from tests.LT2.tiny import DSA, make_choices_clear
from tests.tolerances import FP32_MODEL, assert_same

VOCAB = 40


SMALL = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 32, "vocab_size": VOCAB}


# For any number of loops.
ONE_SEGMENT = {
    "full": {"mixer": "full"},
    "full_gqa_gated": {"mixer": "full", "n_kv_heads": 1, "gated_attn": True},
    "full_no_gate_tied": {"mixer": "full", "use_residual": False, "weight_tying": True},
    "window_4": {"mixer": "window", "default_sliding_window": 4},
    "gdn": {"mixer": "gdn"},
    "gdn_full_4to1": {"mixer": "gdn", "attention_pattern": "4:1", "n_layers": 5},
    "full_gdn_bookend": {
        "mixer": "gdn",
        "hybrid_mixer": "full",
        "attention_pattern": "bookend:1",
        "n_layers": 3,
    },
    "dsa": {"mixer": "dsa", "dsa": DSA},
    "gdn_dsa_1to1": {
        "mixer": "gdn",
        "hybrid_mixer": "dsa",
        "attention_pattern": "1:1",
        "dsa": DSA,
    },
}


# With a segment per loop.
PER_LOOP = {
    "window_to_window_to_full": {"attention_pattern": "3->6->full", "loop_count": 3},
    "gdn_then_full": {"attention_pattern": "gdn->full", "loop_count": 2},
    "families_swap": {"attention_pattern": "gdn,full->5,gdn", "loop_count": 2},
    "random": {
        "mixer": "window",
        "attention_pattern": "random:2:1",
        "default_sliding_window": 4,
        "n_layers": 3,
        "loop_count": 2,
    },
}


MODELS = {
    f"{name}_T{T}": {**changes, "loop_count": T}
    for name, changes in ONE_SEGMENT.items()
    for T in (1, 2)
} | PER_LOOP


def make(*, jitter: float = 0.02, **changes) -> LoopedTransformer:
    torch.manual_seed(0)
    model = LoopedTransformer(LoopedTransformerArgs(**{**SMALL, **changes}))
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += jitter * torch.randn_like(p)
            if name.endswith("A_log") and jitter:
                p[0] = -1.0  # a head that remembers hundreds of tokens, to reveal leaks
        if model.rho is not None and jitter:
            model.rho += 0.5
    make_choices_clear(model)
    return model


def prompt(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0] + [len(d) for d in documents])
    return torch.cat(documents)[None], lengths.cumsum(0).int()


def assert_same_fp32(got: Tensor, want: Tensor) -> None:
    assert_same(got, want, FP32_MODEL)


def decode(model: LoopedTransformer, cache, tokens: Tensor) -> Tensor:
    return torch.cat([model.step(t, cache) for t in tokens.split(1, 1)], 1)
