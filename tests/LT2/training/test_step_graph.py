"""Which steps run as CUDA graphs. tests/gpu/test_step_graph_gpu.py runs the graphs."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.training import step_graph, trainer
from apps.LT2.training.step_graph import StepGraph, StepGraphs, uses_step_graph
from apps.LT2.training.unused_options import _unused_train_options
from apps.LT2.transformer import LoopedTransformerArgs, build_on_meta
from tests.LT2.tiny_run import SMALL, train, train_args, write_corpus

TINY: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16}
STEPS = 8


def computations(**options: Any) -> list[Any]:
    """Return what each of the steps computes."""
    model = build_on_meta(LoopedTransformerArgs(vocab_size=64, seed=0, **TINY, **options))
    found = []
    for step in range(STEPS):
        model.begin_step(step, STEPS)
        found.append(model.computation())
    return found


@pytest.mark.parametrize(
    "options, n_kinds",
    [
        ({"loop_count": 2}, 1),
        ({"loop_count": 4, "loop_schedule": "1@0, 4@0.5"}, 2),
        ({"loop_count": 2, "loop_loss": "uniform", "loop_loss_every": 4}, 4),
        ({"mixer": "dsa", "dsa": DSAArgs(warmup_steps=3)}, 2),
        ({"attention_pattern": "full->gdn", "loop_count": 2}, 1),
    ],
)
def test_equal_computations_are_equal_keys(options, n_kinds):
    assert len(set(computations(**options))) == n_kinds


def test_a_random_layout_is_another_computation():
    options = {"attention_pattern": "random:1:1", "hybrid_mixer": "window"}
    found = computations(loop_count=2, **options)
    layouts = {key[0] for key in found}
    assert len(set(found)) == len(layouts) > 1


def test_the_third_step_of_a_kind_is_captured(monkeypatch, caplog):
    captured, computed, freed = [], [], []
    divisor = torch.ones(())

    class Graph:
        def __init__(self, model, compute, batches, divisor, pool):
            captured.append(batches)
            self.graph = SimpleNamespace(reset=lambda: freed.append(batches))

        def run(self, batches, divisor):
            return [batches], {}

    def compute(batches, divisor):
        computed.append(batches)
        return [batches], {}

    monkeypatch.setattr(step_graph, "StepGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    model: Any = None
    graphs = StepGraphs(model)
    calls: list[tuple[str, Any]] = [
        ("a", 1),
        ("b", 2),
        ("a", 3),
        ("a", 4),
        ("b", 5),
        ("a", 6),
        ("b", 7),
    ]
    results = [graphs.run(key, compute, batch, divisor) for key, batch in calls]
    assert results == [([batch], {}) for _, batch in calls]
    # The first steps of "b" free the graph of "a".
    assert computed == [1, 2, 3, 5] and captured == [4, 6, 7] and freed == [4]
    monkeypatch.setattr(step_graph, "MAX_GRAPHS", 2)
    for key, batch in [("a", 8), ("c", 9), ("a", 10), ("b", 11)]:
        graphs.run(key, compute, batch, divisor)
    # A third kind frees all graphs, and there are none from then on.
    assert computed[4:] == [9, 10, 11] and len(captured) == 3 and sorted(freed) == [4, 6, 7]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "more than 2 kinds" in caplog.text


class Failure(Exception): ...


def test_a_failed_capture_is_freed(monkeypatch):
    """The traceback of its error refers to it."""
    freed = []

    def fail(batches, divisor):
        raise Failure

    graph = SimpleNamespace(reset=lambda: freed.append(True))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    with pytest.raises(Failure):
        StepGraph(nn.Linear(1, 1), fail, [], torch.ones(()), (0, 0))  # pyright: ignore
    assert freed == [True]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_frees_its_graphs(tmp_path, monkeypatch, fails):
    """NCCL's communicators would wait for them at the end of the process."""
    freed, inner = [], trainer.Trainer.free_graphs

    def free(self):
        inner(self)
        assert self.graphs is None

    class Graphs:
        def __init__(self, model): ...

        def clear(self):
            freed.append(True)

        def run(self, key, compute, batches, divisor):
            if fails:
                raise Failure
            return compute(batches, divisor)

    monkeypatch.setattr(trainer, "uses_step_graph", lambda *_: True)
    monkeypatch.setattr(trainer, "StepGraphs", Graphs)
    monkeypatch.setattr(trainer.Trainer, "free_graphs", free)
    data = write_corpus(tmp_path / "data")
    with pytest.raises(Failure) if fails else nullcontext():
        train(data, tmp_path / "run", **SMALL, steps=1)
    assert freed == [True]


RESHARD = {"distributed.fsdp_type": "full_shard", "distributed.reshard_between_loops": True}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, None),
        ({"distributed.fsdp_type": "full_shard"}, None),
        ({"data.doc_mask": True}, "data.doc_mask"),
        ({"distributed.tp_size": 2}, "distributed.tp_size=2"),
        (RESHARD, "distributed.reshard_between_loops"),
    ],
)
def test_which_runs_use_graphs(tmp_path, options, reason):
    wanted = {**SMALL, "distributed.cuda_graph": True}
    args = train_args(tmp_path, tmp_path, **wanted, **options)
    assert uses_step_graph(args, torch.device("cuda")) is (reason is None)
    assert not uses_step_graph(args, torch.device("cpu"))
    warnings = [w for w in _unused_train_options(args) if "cuda_graph" in w]
    assert len(warnings) == (reason is not None) and all(str(reason) in w for w in warnings)
    eager = train_args(tmp_path, tmp_path, **SMALL, **options)
    assert not uses_step_graph(eager, torch.device("cuda"))
