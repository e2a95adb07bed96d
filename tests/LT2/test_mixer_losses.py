"""A mixer's own loss in training: logging, resuming, clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import apps.LT2.train as app
from apps.LT2.mixers import MIXERS
from tests.lingua.dist_utils import run_ranks
from tests.LT2.tiny_run import (
    OPTIONS,
    assert_same_run,
    column,
    records,
    stopped_after,
    tensors,
    train,
    write_corpus,
)

N = OPTIONS["steps"]
LOSS, NORM = "loss/dsa_indexer", "optim/grad_norm_dsa_indexer"
DSA: dict[str, Any] = {
    "model.n_layers": 2,
    "model.mixer": "full",
    "model.attention_pattern": "1:1",
    "model.hybrid_mixer": "dsa",
    "model.dsa.top_k": 6,
    "model.dsa.n_index_heads": 2,
    "model.dsa.index_head_dim": 8,
    "model.dsa.warmup_steps": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def seen(monkeypatch) -> list[float]:
    """The own loss of every micro-batch."""
    losses = []
    inner = app.LoopedTransformer.forward

    def forward(self, *args):
        out = inner(self, *args)
        losses.extend(loss.item() for loss in self.mixer_losses.values())
        return out

    monkeypatch.setattr(app.LoopedTransformer, "forward", forward)
    return losses


def test_a_record_averages_micro_batches_and_steps(data, tmp_path, seen):
    train(data, tmp_path, **DSA, grad_acc_steps=2, **{"logging.freq": 3})
    assert len(seen) == 2 * N and min(seen) > 0
    means = [sum(seen[:6]) / 6, sum(seen[6:]) / 6]
    assert column(tmp_path, LOSS) == pytest.approx(means, rel=1e-6)
    steps = [r for r in records(tmp_path) if "optim/lr" in r]
    assert all(r[LOSS] > 0 and r[NORM] > 0 for r in steps) and len(steps) == 2
    assert not any(LOSS in r for r in records(tmp_path) if "loss/val" in r)


def test_a_resume_between_records_is_exact(data, tmp_path):
    options = {**DSA, "logging.freq": 3}
    train(data, tmp_path / "whole", **options)
    with stopped_after(2):
        train(data, tmp_path / "resumed", **options)
    train(data, tmp_path / "resumed", **options)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", N)
    assert len(column(tmp_path / "resumed", LOSS)) == 2


@pytest.mark.parametrize("warmup_steps, steps", [(N, N), (0, 1)], ids=["dense", "sparse"])
def test_other_weights_step_as_without_the_loss(data, tmp_path, monkeypatch, warmup_steps, steps):
    """Weights are equal to the last bit: the indexer's gradients are clipped separately.

    In sparse attention only for one step: after that the indexers select different keys.
    """
    options = {**DSA, "optim.clip": 1e-3, "steps": steps, "model.dsa.warmup_steps": warmup_steps}
    train(data, tmp_path / "with", **options)
    norms = column(tmp_path / "with", "optim/grad_norm")
    assert min(norms) > 1e-3 and min(column(tmp_path / "with", NORM)) > 1e-3, "all are clipped"

    inner = MIXERS["dsa"].forward_with_loss
    monkeypatch.setattr(
        MIXERS["dsa"],
        "forward_with_loss",
        lambda *args, **options: [0 * x if x.ndim == 0 else x for x in inner(*args, **options)],
    )
    train(data, tmp_path / "without", **options)
    assert column(tmp_path / "without", LOSS) == [0] * steps
    assert column(tmp_path / "without", "optim/grad_norm") == norms
    got, want = (tensors(tmp_path / run, steps)["model"] for run in ("with", "without"))
    for name, weight in got.items():
        assert torch.equal(weight, want[name]) == (".indexer." not in name), name


def test_a_nan_in_the_own_loss_stops_the_run(data, tmp_path, monkeypatch):
    inner = MIXERS["dsa"].forward_with_loss

    def forward_with_loss(self, *args, **options):
        out, loss = inner(self, *args, **options)
        loss.register_hook(lambda grad: grad * torch.nan)
        return out, loss

    monkeypatch.setattr(MIXERS["dsa"], "forward_with_loss", forward_with_loss)
    with pytest.raises(FloatingPointError, match=r"step 1, rank 0: .*indexer.*\.grad"):
        train(data, tmp_path, **DSA)


def train_on_ranks(rank, world_size, data, tmp_path, options) -> list[float]:
    losses = []
    inner = app.LoopedTransformer.forward

    def forward(self, *args):
        out = inner(self, *args)
        losses.extend(loss.item() for loss in self.mixer_losses.values())
        return out

    app.LoopedTransformer.forward = forward
    try:
        train(data, tmp_path, **options)
    finally:
        app.LoopedTransformer.forward = inner
    return losses


def test_a_record_averages_ranks(data, tmp_path):
    """With sharded and whole parameters: the norm of the index keys is whole."""
    options = {**DSA, "steps": 2, "grad_acc_steps": 2, "distributed.fsdp_type": "full_shard"}
    per_rank = run_ranks(2, train_on_ranks, data, tmp_path, options)
    assert per_rank[0] != per_rank[1]
    means = [sum(losses[2 * s] + losses[2 * s + 1] for losses in per_rank) / 4 for s in (0, 1)]
    assert column(tmp_path, LOSS) == pytest.approx(means, rel=1e-6)
