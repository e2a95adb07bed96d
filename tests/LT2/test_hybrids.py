"""Every mixer in every kind of pattern: with another family, and changing from loop to loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apps.LT2.mixers import MIXERS
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from tests.tolerances import FP32_MODEL, assert_same

# 16 query heads per key head, as nsa needs.
SMALL = {"dim": 64, "n_layers": 5, "n_heads": 16, "n_kv_heads": 1, "multiple_of": 32}
VOCAB = 40


def patterns(name: str) -> dict[str, dict[str, Any]]:
    """Return settings of a two-loop model with mixer `name` in every place of a pattern."""
    return {
        "first family": {"mixer": name, "attention_pattern": "4:1"},
        "second family": {"mixer": "gdn", "hybrid_mixer": name, "attention_pattern": "bookend:1"},
        "written out": {"attention_pattern": f"{name}*2,full,3,swa=2"},
        "by loop": {"attention_pattern": f"{name}->3,full,{name}*3"},
    }


# Every mixer in one place, and in every place one of each sort: keys, a state, its own loss.
CASES = [
    (name, place)
    for name in MIXERS
    for place in patterns(name)
    if place == "by loop" or name in ("full", "kda", "dsa")
]


@pytest.fixture(params=CASES, ids=" ".join)
def model(request) -> LoopedTransformer:
    name, place = request.param
    torch.manual_seed(0)
    options = {"loop_count": 2, "default_sliding_window": 4, "vocab_size": VOCAB, **SMALL}
    args = LoopedTransformerArgs(**options, **patterns(name)[place])
    for family in {spec.mixer for loop in args.layout() for spec in loop}:
        own = getattr(args, family, None)
        if hasattr(own, "n_heads"):
            own.n_heads = 2  # linear mixers: a norm over a few channels would magnify rounding
    model = LoopedTransformer(args)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)  # zero gates would hide what they gate
    assert any(spec.mixer == name for loop in model.layout for spec in loop)
    return model.requires_grad_(False)


def prompt(n: int) -> Tensor:
    return torch.randint(VOCAB, (1, n), generator=torch.Generator().manual_seed(n))


def test_a_layer_owns_one_module_of_each_family_it_runs(model):
    for block, column in zip(model.layers, zip(*model.layout, strict=True), strict=True):
        assert {type(mixer) for mixer in block.mixers()} == {MIXERS[s.mixer] for s in column}
        assert len(block.mixers()) == len({MIXERS[s.mixer] for s in column})


def test_cached_decode_equals_full_forward(model):
    tokens = prompt(12)
    cache = model.init_cache(1, 12)
    got = [model.prefill(part, cache) for part in tokens[:, :7].split([4, 3], 1)]
    got += [model.step(token, cache) for token in tokens[:, 7:].split(1, 1)]
    assert_same(torch.cat(got, 1), model(tokens), FP32_MODEL)


def test_packed_documents_equal_separate_ones(model):
    documents = [prompt(n) for n in (6, 1, 9)]
    cu_seqlens = torch.tensor([0, 6, 7, 16], dtype=torch.int32)
    want = torch.cat([model(document) for document in documents], 1)
    assert_same(model(torch.cat(documents, 1), cu_seqlens=cu_seqlens), want, FP32_MODEL)
