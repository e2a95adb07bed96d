"""Which steps run as CUDA graphs. tests/gpu/test_step_graph_gpu.py runs the graphs."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.fixture
def trace(monkeypatch) -> Callable[[str], str]:
    """Run steps of kinds such as "aab", and return what each does.

    Lower case: it runs eagerly. Upper case: it is captured. A dot: it repeats its graph.
    """
    done: list[str] = []
    alive = set()

    class Graph:
        def __init__(self, model, compute, batches, divisor, pool):
            done.append(batches.upper())
            alive.add(self)
            self.graph = SimpleNamespace(reset=lambda: alive.remove(self))
            self.is_new = True

        def run(self, batches, divisor):
            if not self.is_new:
                done.append(".")
            self.is_new = False
            return [batches], {}

    def compute(batches, divisor):
        assert not alive, "both might not fit in memory"
        done.append(batches)
        return [batches], {}

    monkeypatch.setattr(step_graph, "StepGraph", Graph)
    monkeypatch.setattr(step_graph, "MAX_GRAPHS", 2)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    model: Any = None
    graphs, divisor = StepGraphs(model), torch.ones(())

    def run(kinds: str) -> str:
        done.clear()
        for kind in kinds:
            step: Any = kind
            assert graphs.run(kind, compute, step, divisor) == ([kind], {})
        return "".join(done)

    return run


def test_the_third_step_of_a_kind_is_captured(trace):
    assert trace("abaa") == "abaA"
    assert trace("babab") == "bAB.."  # the second step of b frees the graph of a


def test_kinds_without_room_run_eagerly_and_free_the_graphs(trace):
    assert trace("aabbccabab") == "aabbccAB.."
    assert trace("cacabb") == "cAC.bB"


def test_a_run_whose_steps_seldom_repeat_gives_up_graphs(trace, monkeypatch, caplog):
    monkeypatch.setattr(step_graph, "WINDOW", 6)
    assert trace("aaaaaa") == "aaA..."
    assert trace("aaaaaa") == "......"
    assert trace("bbbbbb") == "bbB..."
    assert caplog.text == "", "at least half of them repeat a graph"
    assert trace("cacaca") == "cAcAC."
    assert trace("aaaaaabbbbbb") == "aaaaaabbbbbb"
    assert caplog.text.count("only 1 of the last 6 steps repeated a graph") == 1


class Failure(Exception): ...


def test_a_failed_capture_is_freed(monkeypatch):
    """The traceback of its error refers to it. The weights were freed before, to be gathered."""
    freed, resharded = [], []
    model = nn.Linear(1, 1)

    def fail(batches, divisor):
        assert resharded == [model]
        raise Failure

    monkeypatch.setattr(step_graph, "reshard", resharded.append)

    graph = SimpleNamespace(reset=lambda: freed.append(True))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    with pytest.raises(Failure):
        StepGraph(model, fail, [], torch.ones(()), (0, 0))  # pyright: ignore
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
