"""The kernels of early exits against plain torch, through decode steps of small models."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import apps.LT2.exits
from apps.LT2.exits import ExitRule
from apps.LT2.inference.early_exit import ExitDecoder
from apps.LT2.inference.load import cast_for_inference, fuse_projections
from apps.LT2.kernel import skipped_loops
from apps.LT2.kernel.exit_gate import exit_by_gate
from apps.LT2.kernel.exit_kl import kl_of_logits
from apps.LT2.kernel.skipped_loops.naive import copy_slots_naive
from tests.gpu.test_decode_graph_gpu import CHANGES, DIMS
from tests.LT2.tiny import tiny_model
from tests.tolerances import BF16_KERNEL, relative_error

pytestmark = pytest.mark.gpu


def use_plain_torch(monkeypatch) -> None:
    def copy(copies, upload) -> None:
        copy_slots_naive(copies)

    monkeypatch.setattr(skipped_loops, "launch_copies", copy)
    monkeypatch.setattr(skipped_loops.DeltaUpdate, "has_kernel", False)
    for decide in (exit_by_gate, kl_of_logits):
        monkeypatch.setattr(apps.LT2.exits, decide.__name__, partial(decide, impl="torch"))


@pytest.mark.parametrize("rule", [ExitRule("gate", 0.6), ExitRule("kl", 0.25)], ids=str)
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("kind", ["full", "hybrid", "window", "gdn+dsa"])
def test_kernels_of_exits_equal_plain_torch(monkeypatch, kind, n_rows, rule):
    torch.manual_seed(0)
    model = tiny_model(kind, 3, **{**DIMS, **CHANGES.get(kind, {})}, loop_loss="gate").cuda()
    cast_for_inference(model, torch.bfloat16)
    fuse_projections(model)
    model.get_parameter("exit_gate.weight").normal_(std=0.3)
    tokens = torch.randint(258, (n_rows, 60), device="cuda")
    results = []
    for graph in (True, False):
        if not graph:
            use_plain_torch(monkeypatch)
        cache = model.init_cache(n_rows, 60)
        decoder = ExitDecoder(model, cache, rule, graph=graph)
        model.prefill(tokens[:, :40], cache)
        logits = [decoder.step(token).clone() for token in tokens[:, 40:].split(1, 1)]
        results.append((torch.cat(logits, 1), decoder.tally, cache))
    (got, loops, cache), (want, want_loops, want_cache) = results
    assert loops == want_loops and 1 < loops.n_loops / loops.n_tokens < 3
    assert relative_error(got, want) <= BF16_KERNEL
    for one, other in zip(cache._caches(), want_cache._caches(), strict=True):
        for a, b in zip(one.snapshot(), other.snapshot(), strict=True):
            assert relative_error(a.float(), b.float()) <= BF16_KERNEL
