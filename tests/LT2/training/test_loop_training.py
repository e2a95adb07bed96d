"""Runs whose number of loops changes: resume, gates, optimizer state, metrics, initial weights."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.LT2.flops import step_flops_per_token
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.train import build_run_optimizer
from apps.LT2.training.trainer import _means
from apps.LT2.transformer import RESIZED, ZERO_IF_MISSING, LoopedTransformer, build_on_meta
from lingua.checkpoint import consolidate_checkpoints
from lingua.checkpointing.weights import load_initial_weights
from lingua.errors import UserError
from tests.LT2.tiny_run import (
    SMALL,
    assert_same_run,
    checkpoint,
    column,
    records,
    stopped_after,
    tensors,
    train,
    train_args,
)

N = 6
# In the second loop the layer has another mixer, which steps of one loop don't run.
LOOPS: dict[str, Any] = {
    **SMALL,
    "model.loop_count": 3,
    "model.attention_pattern": "gdn->full->gdn",
    "eval.validation": None,
}
SCHEDULE = {
    "model.loop_schedule": "1@0, 2@0.5, 3@0.7",
    "optim.rewarmup": 2,
    "optim.scheduler": "constant",
    "optim.lr": 1e-2,
    "model.loop_loss": [1, 1, 2],
}
SAMPLE = {"model.loop_sample": "uniform:1,2,3", "model.loop_bptt": 2, "optim.name": "muon"}
SAMPLE["model.loop_loss"] = "gate"
VOCABULARY = {"model.vocab_size": 258}
CASES = {"schedule": (SCHEDULE, [1, 1, 1, 2, 3, 3]), "sample": (SAMPLE, [1, 2, 2, 2, 2, 3])}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return a function that trains each case without interruption, once."""

    @cache
    def run(case: str) -> Path:
        return train(data, tmp_path_factory.mktemp("whole"), **LOOPS, **CASES[case][0])

    return run


@pytest.mark.parametrize("case", CASES)
def test_the_run_follows_its_loops(case, whole):
    run, (options, loops) = whole(case), CASES[case]
    assert column(run, "optim/loops") == loops
    model = build_on_meta(
        train_args(run, run, **LOOPS, **options, **{"model.vocab_size": 258}).model
    )
    flops = [64 * step_flops_per_token(model, 32, n_loops) for n_loops in loops]
    assert column(run, "optim/total_flops") == [sum(flops[: i + 1]) for i in range(N)]
    state = tensors(run, N)["optim"]["state"]["rho"]
    n_updates = [sum(n > t for n in loops) for t in range(3)]
    assert state["step"].tolist() == n_updates


@pytest.mark.parametrize("case", CASES)
def test_it_resumes_to_the_bit_across_a_change(case, whole, data, tmp_path):
    with stopped_after(3):
        train(data, tmp_path, **LOOPS, **CASES[case][0])
    assert_same_run(train(data, tmp_path, **LOOPS, **CASES[case][0]), whole(case), N)


def test_mean_loops_of_a_record_include_steps_before_a_resume(data, tmp_path):
    options = {**LOOPS, "model.loop_schedule": "1@0, 3@0.6", "steps": 3, "logging.freq": 3}
    options["checkpoint.eval.every"] = 0
    with stopped_after(1):
        train(data, tmp_path, **options)
    assert column(train(data, tmp_path, **options), "optim/loops") == pytest.approx([5 / 3])


@pytest.mark.parametrize("case", CASES)
def test_metrics_have_the_loss_of_each_loop(case, whole):
    run, (_, loops) = whole(case), CASES[case]
    for record, n_loops in zip(records(run), loops, strict=True):
        keys = [key for key in record if key.startswith("loss/loop/")]
        assert keys == [f"loss/loop/{t}" for t in range(n_loops)]
        assert record["loss/out"] == pytest.approx(record[keys[-1]])
        exits = [value for key, value in record.items() if key.startswith("loops/exit/")]
        assert sum(exits) == pytest.approx(1 if case == "sample" else 0)


def test_an_exit_gate_learns_in_steps_that_have_exits(whole):
    gates = {step: tensors(whole("sample"), step)["model"] for step in (2, N)}
    assert all(gates[step]["exit_gate.bias"].any() for step in gates)
    state = tensors(whole("sample"), N)["optim"]["state"]["exit_gate.weight"]
    assert state["step"] == sum(n > 1 for n in CASES["sample"][1])


def test_an_exit_gate_starts_from_zero_in_weights_without_one(whole, tmp_path, caplog):
    source = checkpoint(whole("schedule"), N)
    args = train_args(tmp_path, tmp_path, **LOOPS, **VOCABULARY, **{"model.loop_loss": "gate"})
    model = LoopedTransformer(args.model)
    load_initial_weights(str(source), model, ZERO_IF_MISSING, RESIZED)
    assert model.exit_gate is not None
    assert not model.exit_gate.weight.any() and not model.exit_gate.bias.any()
    assert "exit_gate.weight" in caplog.text


def test_own_losses_of_an_older_checkpoint():
    assert _means({"mixer_losses": {"dsa_indexer": [2.0]}}) == {"loss/dsa_indexer": [2.0]}
    assert _means({}) == {}


def test_new_loops_start_from_the_last_gate(whole):
    run = whole("schedule")
    gates = {step: tensors(run, step)["model"]["rho"] for step in (2, 4, 6)}
    assert gates[2].any() and torch.equal(gates[2], gates[2][:1].expand(3, -1))
    assert torch.equal(gates[4][1], gates[4][2]) and not torch.equal(gates[4][0], gates[4][1])
    assert not torch.equal(gates[6][1], gates[6][2])
    state = tensors(run, 4)["optim"]["state"]["rho"]
    assert not state["exp_avg"][2].any() and not state["exp_avg_sq"][2].any()


def test_the_learning_rate_warms_up_again(whole):
    # Changes after steps 3 and 4 of 6.
    lr = [1e-2, 1e-2, 1e-2, 5e-3, 5e-3, 1e-2]
    assert column(whole("schedule"), "optim/lr") == pytest.approx(lr)


def test_a_phase_that_starts_with_the_run_does_not_warm_up_again(tmp_path):
    options = {**LOOPS, **VOCABULARY, **SCHEDULE, "model.loop_schedule": "1@0, 3@0.01"}
    options["optim.warmup"] = 0
    args = train_args(tmp_path, tmp_path, **options)
    optimizer, _ = build_run_optimizer(args, LoopedTransformer(args.model))
    assert optimizer.param_groups[0]["lr"] == args.optim.lr


# ---- a checkpoint with other loops


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("pattern", ["gdn->full", "gdn->full->gdn->gdn->full"])
def test_initial_weights_get_gates_for_other_loops(form, pattern, whole, tmp_path, caplog):
    source, n_loops = checkpoint(whole("schedule"), N), 1 + pattern.count("->")
    gates = tensors(whole("schedule"), N)["model"]["rho"]
    if form == "file":
        source = shutil.copytree(consolidate_checkpoints(source), tmp_path / "weights")
    options = {"model.loop_count": n_loops, "model.attention_pattern": pattern}
    args = train_args(tmp_path, tmp_path, **LOOPS | options, **VOCABULARY)
    model = LoopedTransformer(args.model)
    stored = load_initial_weights(str(source), model, resized=RESIZED)
    assert stored["rho"] == (3, 32)
    assert model.rho is not None and torch.equal(model.rho, gates[[0, 1, 2, 2, 2][:n_loops]])
    assert f"model.loop_count={n_loops} on weights trained with 3" in caplog.text


def test_gates_of_initial_weights_are_kept_until_their_loop_runs(whole, data, tmp_path):
    gates = tensors(whole("schedule"), N)["model"]["rho"]
    options = {**LOOPS, "model.loop_count": 4, "model.attention_pattern": "gdn->full->gdn->full"}
    options |= {"checkpoint.init_ckpt_path": whole("schedule"), "steps": 1}
    options["model.loop_schedule"] = "1@0, 4@0.9"
    run = train(data, tmp_path, **options)
    got = tensors(run, 1)["model"]["rho"]
    assert torch.equal(got[1:], gates[[1, 2, 2]]) and not torch.equal(got[0], gates[0])
    log = (run / "train.log").read_text()
    assert "model.loop_count=4 on weights trained with 3" in log
    assert "model.loop_schedule:" not in log and "model.loop_loss:" not in log


def test_a_resume_with_other_loops_names_init_ckpt_path(whole, data, tmp_path):
    run, other = whole("schedule"), {**LOOPS, "model.attention_pattern": "gdn", "steps": 9}
    other |= {"model.loop_count": 2, "model.use_residual": False}
    with pytest.raises(UserError, match=r"^model\.loop_count=2.*checkpoint\.init_ckpt_path="):
        train(data, run, **other)
    init = {"checkpoint.init_ckpt_path": run, "checkpoint.continue_training_from_init": True}
    with pytest.raises(UserError, match=r"^model\.loop_count=2.*continue_training_from_init=false"):
        train(data, tmp_path / "new", **other, **init)
    assert not (tmp_path / "new").exists()


def test_inference_runs_loop_count_or_any_other_number(whole):
    run = whole("schedule")
    model = load_model_and_tokenizer(str(run), device="cpu").model
    gated = load_model_and_tokenizer(str(whole("sample")), device="cpu").model
    assert gated.exit_gate is not None and gated.exit_gate.weight.any()
    assert model.exit_gate is None
    assert model.n_loops == len(model.init_cache(1, 4).mixers) == 3 and not model.loop_plan.varies
