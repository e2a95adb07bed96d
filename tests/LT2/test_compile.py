"""Blocks compile into one graph with every mixer, once per kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from apps.LT2.inference.compiled import compiled_for_generation
from apps.LT2.loops import parse_loop_plan
from apps.LT2.mixers import MIXERS
from apps.LT2.mixers.linear import LinearMixer
from apps.LT2.parallel import (
    build_fsdp_grouping_plan,
    count_block_kinds,
)
from apps.LT2.transformer import LoopedTransformer
from lingua.distributed import parallelize_model
from lingua.errors import UserError
from lingua.parallel.args import DistributedArgs
from tests.LT2.tiny import tiny_model
from tests.tolerances import FP32, assert_same

N_TOKENS = 24


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]


class CountGraphs:
    """A backend that counts graphs and runs them unchanged."""

    def __init__(self):
        self.n_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.n_graphs += 1
        return graph.forward


# ---- one graph


def offsets(*ends: int) -> torch.Tensor:
    return torch.tensor([0, *ends, N_TOKENS], dtype=torch.int32)


def is_linear(kind: str) -> bool:
    model = tiny_model(kind, 1)
    return any(issubclass(MIXERS[s.mixer], LinearMixer) for loop in model.layout for s in loop)


# On CPU a recurrence runs in chunked form, which reads cu_seqlens in Python.
SINGLE = [*MIXERS, "window"]
CASES = [(kind, None) for kind in SINGLE]
CASES += [(kind, offsets(5, 9)) for kind in SINGLE if not is_linear(kind)]


@pytest.mark.parametrize("kind, cu_seqlens", CASES)
def test_no_mixer_breaks_the_graph(kind, cu_seqlens):
    model = tiny_model(kind, 1, n_layers=1).requires_grad_(True)
    h = torch.randn(2 if cu_seqlens is None else 1, N_TOKENS, model.args.dim)
    for block, spec in zip(model.layers, model.layout[0], strict=True):
        inputs = (h, spec, cu_seqlens, True)
        got, got_loss = torch.compile(block, fullgraph=True, backend="eager")(*inputs)
        want, want_loss = block(*inputs)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert (got_loss is None) == (want_loss is None)


# ---- number of graphs

WINDOWS = "5->9"


def compiled(
    monkeypatch, pattern: str, *, mode: str = "none", limit: int = 8
) -> tuple[LoopedTransformer, CountGraphs]:
    counter = CountGraphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    options = {"n_layers": 2, "attention_pattern": pattern}
    model = tiny_model("gdn", 1 + pattern.count("->"), **options).requires_grad_(True)
    model.checkpoint_loops = mode == "loop"
    args = DistributedArgs(
        model_dtype="fp32",
        compile=True,
        compile_cache_size_limit=limit,
        activation_checkpointing=mode,
    )
    plan = build_fsdp_grouping_plan(model.args)
    parallelize_model(model, None, None, args, plan, n_block_kinds=count_block_kinds(model))
    return model, counter


def run(model: LoopedTransformer, *, train: bool, cu_seqlens: torch.Tensor | None = None) -> None:
    tokens = torch.zeros(1, N_TOKENS, dtype=torch.int64)
    with torch.set_grad_enabled(train):
        loss = model(tokens, tokens, cu_seqlens)
    if train:
        loss.backward()


@pytest.mark.parametrize(
    "pattern, mode, n_kinds",
    [
        ("retnet,5->full", "selective", 3),
        ("9,5->full", "loop", 3),
    ],
)
def test_layers_of_a_kind_share_compiled_code(monkeypatch, pattern, mode, n_kinds):
    model, counter = compiled(monkeypatch, pattern, mode=mode)
    for n_graphs, train in ((n_kinds, True), (n_kinds, True), (2 * n_kinds, False)):
        run(model, train=train)
        assert counter.n_graphs == n_graphs


@pytest.mark.parametrize("bptt", [None, 1])
def test_another_number_of_loops_compiles_nothing(monkeypatch, bptt):
    model, counter = compiled(monkeypatch, "5->5->5")
    model.args.loop_bptt = bptt
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for n_loops in (3, 2, 1, 3, 2):
        step_of(model, n_loops)
        assert counter.n_graphs == (1 if bptt is None else 2)  # with and without gradients
        assert graphs["unique_graphs"] - before == counter.n_graphs


def step_of(model: LoopedTransformer, n_loops: int) -> None:
    model.loop_plan = parse_loop_plan(3, f"{n_loops}@0", None, 0)
    model.begin_step(0)
    run(model, train=True)


def test_numbers_of_documents_share_compiled_code(monkeypatch):
    model, counter = compiled(monkeypatch, WINDOWS)
    for ends in ((3,), (5, 9), (2, 3, 4, 20), ()):
        run(model, train=True, cu_seqlens=offsets(*ends))
        assert counter.n_graphs == 2


def test_a_chunked_recurrence_does_not_recompile_for_other_documents(monkeypatch):
    model, counter = compiled(monkeypatch, "gdn")
    run(model, train=True, cu_seqlens=offsets(3))
    n_graphs = counter.n_graphs
    for ends in ((5, 9), (2, 3, 4, 20), ()):
        run(model, train=True, cu_seqlens=offsets(*ends))
        assert counter.n_graphs == n_graphs


def test_the_limit_applies_per_kind_of_layer(monkeypatch):
    model, _ = compiled(monkeypatch, WINDOWS, limit=2)
    run(model, train=True)
    run(model, train=False)


def test_more_versions_than_the_limit_are_a_user_error(monkeypatch):
    model, _ = compiled(monkeypatch, WINDOWS, limit=1)
    run(model, train=True)
    with pytest.raises(UserError, match=r"distributed\.compile_cache_size_limit=1"):
        run(model, train=False)


# ---- generation


def test_inductor_compiles_a_prefill_of_any_length(monkeypatch):
    """For packed prompts; tests/gpu has more kinds, and prompts in rows.

    Inductor calls ATen for every operator: compiling C++ kernels would take most of the time, and
    tests nothing of ours.
    """
    monkeypatch.setattr("torch._inductor.config.fallback_by_default", True)
    model = tiny_model("full", 1, n_layers=1)

    def prefill(n_tokens: int) -> torch.Tensor:
        tokens = torch.arange(3 * n_tokens)[None]
        cu_seqlens = torch.arange(4, dtype=torch.int32) * n_tokens
        return model.prefill(tokens, model.init_cache(3, 20), cu_seqlens=cu_seqlens)

    lengths = (6, 11)
    want = [prefill(n) for n in lengths]
    with compiled_for_generation(model, prefill=True):
        for n, logits in zip(lengths, want, strict=True):
            assert_same(prefill(n), logits, FP32)
