"""A run whose steps are CUDA graphs is the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

import apps.LT2.train as app
from apps.LT2.training import step_graph
from tests.LT2.tiny_run import column, tensors, train, write_corpus

pytestmark = pytest.mark.gpu

STEPS = 8
BF16: dict[str, Any] = {
    "steps": STEPS,
    "distributed.model_dtype": "bf16",
    "distributed.fsdp_type": "full_shard",
    "model.dim": 128,
    "model.gdn.head_dim": 32,
    "data.seq_len": 100,
    "grad_acc_steps": 2,
    "checkpoint.eval.every": 4,  # validation between replays gathers the weights
    "checkpoint.dump.every": STEPS,
    "optim.lr": 1e-3,
}
# options, and the number of graphs at the end
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "hybrid": ({}, 1),
    "compiled": (
        {"distributed.compile": True, "distributed.activation_checkpointing": "selective"},
        1,
    ),
    "recomputed": ({"distributed.activation_checkpointing": "full"}, 1),
    "loops": ({"distributed.activation_checkpointing": "loop"}, 1),
    # T = 1 in steps 1, 7 and 8: step 7 is eager and frees the graph of T = 2.
    "sampled": ({"model.loop_sample": "uniform:1,2", "model.loop_loss": "gate"}, 1),
    # Two offsets of the sampled tokens.
    "loop loss": ({"model.loop_loss": "uniform", "model.loop_loss_every": 2}, 2),
    # Its dense steps come first. Their graph is freed.
    "dsa": (
        {
            "model.mixer": "dsa",
            "model.attention_pattern": None,
            "model.dsa.warmup_steps": 4,
            "model.dsa.top_k": 16,
            "logging.acc_freq": 1,
        },
        1,
    ),
    "fp32, without FSDP": (
        {"distributed.model_dtype": "fp32", "model.attention_pattern": "full"},
        1,
    ),
    "probed": ({"probe_freq": 3}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_equal_eager_steps(case, tmp_path, monkeypatch):
    data, (options, n_graphs) = write_corpus(tmp_path / "data", n_lines=200), CASES[case]
    counts: list[int | None] = []
    inner = app.Trainer.free_graphs

    def count_and_free(self: app.Trainer) -> None:
        counts.append(None if self.graphs is None else len(self.graphs.graphs))
        inner(self)

    monkeypatch.setattr(app.Trainer, "free_graphs", count_and_free)
    runs = []
    for cuda_graph in (False, True):
        options = {**BF16, **options, "distributed.cuda_graph": cuda_graph}
        torch.compiler.reset()
        # Else Inductor times kernels that sum in other orders, and takes the fastest. Its option
        # `deterministic` would not last: when it compiles, Dynamo resets it.
        with inductor_config.patch("test_configs.force_filter_reduction_configs", True):
            runs.append(train(data, tmp_path / f"run_{cuda_graph}", **options))
    eager, graphed = runs
    assert counts == [None, n_graphs]
    keys = ("loss/out", "loss/val", "optim/grad_norm", "acc_step")
    keys = (*keys, "loss/objective", "loss/dsa_indexer", "loops/residual_rms/1")
    for key in keys:
        assert column(graphed, key) == pytest.approx(column(eager, key), rel=1e-5), key
    assert len(column(eager, "loss/val")) >= 2
    want, got = tensors(eager, STEPS)["model"], tensors(graphed, STEPS)["model"]
    for name, weight in want.items():
        assert (got[name] - weight).norm() <= 1e-5 * weight.norm(), name


def test_too_many_computations_run_without_graphs(tmp_path, monkeypatch):
    monkeypatch.setattr(step_graph, "MAX_GRAPHS", 0)
    data = write_corpus(tmp_path / "data", n_lines=200)
    run = train(data, tmp_path / "run", **BF16, **{"distributed.cuda_graph": True})
    assert len(column(run, "loss/out")) == STEPS
