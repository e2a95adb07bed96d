"""The loss of a step: its nats over its targets, however micro-batches and ranks cut the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from apps.LT2.batch import to_device
from apps.LT2.parallel import build_fsdp_grouping_plan, tp_parallelize
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.probes import log_micro_batches, run_probed_pass
from apps.LT2.training.progress import Progress
from apps.LT2.training.trainer import Trainer, TrainState
from apps.LT2.transformer import LoopedTransformer
from lingua.dataloader.args import DataArgs
from lingua.dataloader.packing import view_row
from lingua.distributed import (
    get_device_mesh,
    get_dp_rank_and_degree,
    parallelize_model,
)
from lingua.metrics import LoggingArgs, MetricLogger
from lingua.optim import OptimArgs, build_optimizer
from lingua.parallel.args import DistributedArgs
from lingua.probe import Probe
from tests.lingua.dist_utils import run_ranks
from tests.LT2.tiny import tiny_model
from tests.tolerances import FP32, differences
from tests.waiting import no_waiting

CPU = torch.device("cpu")
ROWS, SEQLEN = 4, 20
KINDS = ("full", "gdn", "dsa", "exits")
# Lengths of the documents of each row. Of the 20 inputs 0, 3, 15 and 20 have a target.
DOCUMENTS = [[1] * 21, [1] * 17 + [4], [4] * 5 + [1], [21]]


def make_rows(doc_mask: bool, documents: list[list[int]] = DOCUMENTS) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = []
    for lengths in documents:
        starts = np.zeros(SEQLEN + 1, dtype=np.int64)
        starts[np.cumsum([0, *lengths[:-1]])] = 1
        tokens = generator.integers(258, size=SEQLEN + 1)
        rows.append(view_row(tokens, 2, starts if doc_mask else None))
    return np.stack(rows)


def make_model(kind: str) -> LoopedTransformer:
    if kind == "exits":
        return tiny_model("full", 2, n_layers=1, loop_loss="gate").requires_grad_(True)
    return tiny_model(kind, 2, n_layers=1).requires_grad_(True)


class Recorder(SGD):
    """Keep the clipped gradients of the last step, and change no weight."""

    def __init__(self, model: LoopedTransformer):
        super().__init__(model.parameters(), lr=0.0)
        self.names = [name for name, _ in model.named_parameters()]
        self.grads: dict[str, Tensor] = {}

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.grads = {n: p.grad for n, p in zip(self.names, parameters, strict=True)}


def make_trainer(
    model: LoopedTransformer,
    rows: np.ndarray,
    n_micro: int,
    mesh: Any = None,
    optimizer: Optimizer | None = None,
    clip: float = 0.0,
) -> Trainer:
    """Make a trainer for one step on `rows`: a share for each rank, cut into micro-batches."""
    rank, degree = get_dp_rank_and_degree(mesh)
    micro_batches = np.split(np.split(rows, degree)[rank], n_micro)
    args = TrainArgs(
        grad_acc_steps=n_micro,
        model=model.args,
        data=DataArgs(
            batch_size=len(micro_batches[0]), seq_len=SEQLEN, doc_mask=rows.shape[-1] == 3
        ),
        optim=OptimArgs(clip=clip),
        distributed=DistributedArgs(model_dtype="fp32"),
        logging=LoggingArgs(freq=1, acc_freq=1),
    )
    optimizer = optimizer or Recorder(model)
    state = TrainState(0, 0, {}, LambdaLR(optimizer, lambda step: 1.0))  # pyright: ignore
    return Trainer(args, model, optimizer, state, iter([(m, {}) for m in micro_batches]), mesh, CPU)


def step(trainer: Trainer) -> dict[str, float]:
    """Take a step, and return its losses and gradient norms as they are logged."""
    progress = Progress(trainer, flops_per_token={trainer.model.n_loops: 1})
    progress.add(trainer.step())
    record = progress.record()
    logged = ("loss/", "loops/", "optim/grad_norm")
    return {key: v for key, v in record.items() if key.startswith(logged)}


@cache
def expected(kind: str, doc_mask: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Compute a step's record and gradients from all rows at once."""
    model = make_model(kind)
    x, target, cu_seqlens = to_device(make_rows(doc_mask), doc_mask, CPU)
    loss, loop_metrics = model(x, target, cu_seqlens), model.loop_metrics
    assert bool(loop_metrics) == (kind == "exits")
    with torch.no_grad():
        logits = model(x, None, cu_seqlens).flatten(0, 1)
    nats = F.cross_entropy(logits, target.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(nats.item() / (38 if doc_mask else 80), rel=1e-6)
    loss.backward()
    own = model.own_loss_parameters()
    apart = {p for weights in own.values() for p in weights}
    rest = [p for p in model.parameters() if p not in apart]
    record = {"loss/out": loss.item(), "optim/grad_norm": norm(rest)}
    record |= {key: mean.item() for key, mean in loop_metrics.items()}
    for name, weights in own.items():
        record[f"loss/{name}"] = model.mixer_losses[name].item()
        record[f"optim/grad_norm_{name}"] = norm(weights)
    return record, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def norm(parameters: list[torch.nn.Parameter]) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.stack([grad.norm() for grad in grads]).norm().item()


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    assert isinstance(trainer.optimizer, Recorder)
    return trainer.optimizer.grads


def assert_record(got: dict[str, float], kind: str, doc_mask: bool) -> None:
    want, _ = expected(kind, doc_mask)
    assert got == {key: pytest.approx(value, rel=1e-6) for key, value in want.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("doc_mask", [True, False])
@pytest.mark.parametrize("n_micro", [1, 2, 4])
def test_a_step_does_not_depend_on_its_micro_batches(kind, doc_mask, n_micro):
    trainer = make_trainer(make_model(kind), make_rows(doc_mask), n_micro)
    assert_record(step(trainer), kind, doc_mask)
    _, want = expected(kind, doc_mask)
    assert differences(gradients(trainer), want, FP32) == ""


# ---- ranks

FULL_SHARD = {"fsdp_type": "full_shard"}
# (options of `distributed:`, kind)
TWO_RANKS: list[tuple[dict[str, Any], str]] = [
    *(({**FULL_SHARD, "dp_replicate": 2}, kind) for kind in KINDS),
    ({"tp_size": 2}, "full"),
]
FOUR_RANKS: list[tuple[dict[str, Any], str]] = [
    ({**FULL_SHARD, "dp_replicate": 4}, "exits"),
    ({"dp_replicate": 4}, "full"),
    ({**FULL_SHARD, "dp_replicate": 2, "dp_shard": 2}, "dsa"),
    ({**FULL_SHARD, "dp_replicate": 2, "tp_size": 2}, "gdn"),
]


def make_parallel(kind: str, options: dict[str, Any]) -> tuple[LoopedTransformer, Any]:
    args = DistributedArgs(model_dtype="fp32", **options)
    model, mesh = make_model(kind), get_device_mesh(args)
    plan = build_fsdp_grouping_plan(model.args)
    parallelize_model(model, mesh, model.args, args, plan, tp_parallelize)
    return model, mesh


def steps_on_ranks(
    rank: int, world_size: int, cases: list[tuple[dict[str, Any], str]]
) -> list[tuple[str, bool, dict[str, float]]]:
    records = []
    for options, kind in cases:
        model, mesh = make_parallel(kind, options)
        n_micro = ROWS // get_dp_rank_and_degree(mesh)[1]
        optimizer = SGD(model.parameters(), lr=0.0)
        for doc_mask in (True, False):
            trainer = make_trainer(model, make_rows(doc_mask), n_micro, mesh, optimizer)
            records.append((kind, doc_mask, step(trainer)))
    return records


def test_a_step_does_not_depend_on_four_ranks():
    for records in run_ranks(4, steps_on_ranks, FOUR_RANKS):
        for kind, doc_mask, record in records:
            assert_record(record, kind, doc_mask)


def check_two_ranks(rank: int, world_size: int) -> tuple[Any, ...]:
    model, mesh = make_parallel("full", TWO_RANKS[0][0])
    rows = make_rows(doc_mask=True)
    trainer = make_trainer(model, rows, 2, mesh, SGD(model.parameters(), lr=0.0))
    log_micro_batches(trainer, metrics := Metrics())
    trainer.step()
    batch = to_device(np.split(rows, 2)[rank], True, CPU)
    stats = run_probed_pass(model, Probe(model), batch, mesh)
    return steps_on_ranks(rank, world_size, TWO_RANKS), metrics.records, stats


def test_a_step_its_records_and_its_probe_do_not_depend_on_two_ranks():
    model, rows = make_model("full"), make_rows(doc_mask=True)
    first_of_ranks = mean_loss(model, rows[[0, 2]])
    want = run_probed_pass(model, Probe(model), to_device(rows, True, CPU), None)
    for records, micro_batches, stats in run_ranks(2, check_two_ranks):
        for kind, doc_mask, record in records:
            assert_record(record, kind, doc_mask)
        assert [r["loss/out"] for r in micro_batches] == [pytest.approx(first_of_ranks, rel=1e-6)]
        assert stats == {key: pytest.approx(value, rel=1e-5) for key, value in want.items()}


# ---- records of micro-batches, and steps without targets


class Metrics(MetricLogger):
    """Keep the records in memory."""

    def __init__(self):
        self.records: list[Mapping[str, Any]] = []

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.records.append(metrics)


def mean_loss(model: LoopedTransformer, rows: np.ndarray) -> float:
    with torch.no_grad():
        return model(*to_device(rows, True, CPU)).item()


def test_the_record_of_a_micro_batch_is_the_mean_of_its_targets():
    model, rows = make_model("full"), make_rows(doc_mask=True)
    log_micro_batches(trainer := make_trainer(model, rows, 4), metrics := Metrics())
    trainer.step()
    want = [mean_loss(model, rows[i : i + 1]) for i in (1, 2)]
    without, *losses = [r["loss/out"] for r in metrics.records]
    assert losses == pytest.approx(want, rel=1e-6) and math.isnan(without)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_micro", [1, 2])
def test_a_step_without_targets_warns_and_updates_nothing(kind, n_micro, caplog):
    model = make_model(kind)
    optimizer, _ = build_optimizer(model, OptimArgs(warmup=0), 3)
    trainer = make_trainer(model, make_rows(True), n_micro, optimizer=optimizer)
    step(trainer)
    before = deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    trainer.state.clear_losses()
    empty = make_rows(True, [[1] * 21] * ROWS)
    trainer.batches = iter([(part, {}) for part in np.split(empty, n_micro)])
    record = step(trainer)
    after = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert trainer.state.step == trainer.state.scheduler.last_epoch == 2
    assert math.isnan(record["loss/out"]) and record["optim/grad_norm"] == 0
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "step 2 " in warning.getMessage() and "data.doc_mask" in warning.getMessage()

    trainer.state.clear_losses()
    trainer.batches = iter([(part, {}) for part in np.split(make_rows(True), n_micro)])
    assert math.isfinite(step(trainer)["loss/out"])


def test_the_whole_gradient_is_clipped():
    whole_norm = expected("full", True)[0]["optim/grad_norm"]
    trainer = make_trainer(make_model("full"), make_rows(True), 4, clip=whole_norm / 2)
    assert step(trainer)["optim/grad_norm"] == pytest.approx(whole_norm, rel=1e-6)
    want = {name: grad / 2 for name, grad in expected("full", True)[1].items()}
    assert differences(gradients(trainer), want, FP32) == ""


# ---- the update


@pytest.mark.parametrize("kind", ["full", "dsa"])
def test_the_host_reads_nothing_until_the_update_is_launched(kind):
    model = make_model(kind)
    optimizer, _ = build_optimizer(model, OptimArgs(warmup=0), 3)
    trainer = make_trainer(model, make_rows(False), 2, optimizer=optimizer, clip=1.0)
    with ExitStack() as waiting:
        trainer.before_step = lambda batch: waiting.enter_context(no_waiting())
        optimizer.register_step_post_hook(lambda *_: waiting.close())
        trainer.step()
    assert optimizer.state[model.norm.weight]["step"] == 1
