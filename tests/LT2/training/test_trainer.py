"""NaN gradients, metrics records, and changed options at a resume."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex

import pytest
import torch

import apps.LT2.train as app
from apps.LT2.training.trainer import TrainState
from lingua.checkpointing.folder import find_problem
from lingua.errors import UserError
from lingua.slurm.code import code_version
from tests.lingua.dist_utils import run_ranks
from tests.LT2 import tiny_run
from tests.LT2.tiny_run import (
    OPTIONS,
    SMALL,
    TWO_LAYERS,
    checkpoint,
    column,
    fingerprint,
    records,
    stopped_after,
    tensors,
    write_corpus,
)

pytestmark = pytest.mark.slow

N = OPTIONS["steps"]
BAD = "layers.1.ffn_norm.weight"


def train(data: Path, dump_dir: Path, **changes) -> Path:
    return tiny_run.train(data, dump_dir, **{**TWO_LAYERS, **changes})


def poison(monkeypatch, steps, rank=0, in_rank=0):
    """Put NaN into one gradient of the given steps, counted from 1."""
    inner = app.Trainer.step

    def step(self):
        bad = self.state.step + 1 in steps and rank == in_rank
        weight = self.model.get_parameter(BAD)
        handle = weight.register_hook(lambda grad: grad * math.nan if bad else grad)
        try:
            return inner(self)
        finally:
            handle.remove()

    monkeypatch.setattr(app.Trainer, "step", step)


def test_a_nan_gradient_stops_the_run_and_is_named(data, tmp_path, monkeypatch):
    poison(monkeypatch, {5})
    with pytest.raises(FloatingPointError, match=f"step 5, rank 0: .*{BAD}.grad"):
        train(data, tmp_path)
    assert find_problem(checkpoint(tmp_path, 4)) is None
    assert not checkpoint(tmp_path, 5).exists()
    assert column(tmp_path, "global_step")[-1] == 4


def test_skipped_steps_change_no_weight(data, tmp_path, monkeypatch):
    poison(monkeypatch, {3})
    train(data, tmp_path, **{"optim.skip_nonfinite": 1})
    before, after = tensors(tmp_path, 2), tensors(tmp_path, 3)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert column(tmp_path, "optim/grad_norm")[2] is None
    assert all(map(math.isfinite, column(tmp_path, "loss/out")))
    assert not torch.equal(tensors(tmp_path, N)["model"][BAD], after["model"][BAD])

    poison(monkeypatch, {3, 4})
    with pytest.raises(FloatingPointError, match="step 4, .*2 steps in a row"):
        train(data, tmp_path / "again", **{"optim.skip_nonfinite": 1})


# These runs end early with an error.
SHARDED = {
    "distributed.fsdp_type": "full_shard",
    "checkpoint.dump.every": 0,
    "eval.validation": None,
}
SHARDED["model.loop_count"] = 1


def poison_rank_1(rank, world_size, data, tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, {2}, rank, in_rank=1)
        with pytest.raises(FloatingPointError, match=f"step 2, rank {rank}"):
            train(data, tmp_path, **SHARDED)


def lose_data_on_rank_1(rank, world_size, data, tmp_path):
    inner = app.Trainer._read_micro_batches

    def read(self):
        if rank == 1 and self.state.step == 2:
            raise UserError("text.chunk.01.jsonl:7: not JSON")
        return inner(self)

    app.Trainer._read_micro_batches = read
    try:
        with pytest.raises(UserError, match="text.chunk.01.jsonl:7: not JSON"):
            train(data, tmp_path, **SHARDED)
    finally:
        app.Trainer._read_micro_batches = inner


def check_two_ranks(rank, world_size, data, tmp_path):
    poison_rank_1(rank, world_size, data, tmp_path / "nan")
    lose_data_on_rank_1(rank, world_size, data, tmp_path / "lost")
    train(data, tmp_path / "data", steps=2)
    with pytest.raises(UserError, match="data.seq_len.* 16.* 32"):
        train(data, tmp_path / "data", **{"data.seq_len": 16})


def test_an_error_on_one_rank_stops_all(data, tmp_path):
    run_ranks(2, check_two_ranks, data, tmp_path)

    train(data, tmp_path / "data")  # saved by two ranks, resumed by one
    log = (tmp_path / "data" / "train.log").read_text()
    assert "2 data-parallel ranks" in log
    assert "config changed since the checkpoint: distributed.dp_replicate: 2 -> 1" in log
    batch = OPTIONS["data.batch_size"] * OPTIONS["data.seq_len"]
    n_tokens = column(tmp_path / "data", "optim/total_tokens")
    assert n_tokens == [batch * n for n in (2, 4, 5, 6, 7, 8)]


# ---- records


def test_a_record_averages_the_steps_since_the_last(data, tmp_path):
    options = {"grad_acc_steps": 4}
    train(data, tmp_path / "each", **options, **{"logging.acc_freq": 1})
    train(data, tmp_path / "third", **options, **{"logging.freq": 3})

    each = records(tmp_path / "each")
    micro = {
        (r["global_step"] + 1, r["acc_step"]): r["loss/out"]
        for r in each
        if "loss/out" in r and r["acc_step"]
    }
    assert list(micro) == [(step, k) for step in range(1, N + 1) for k in (1, 2, 3)]
    whole = {r["global_step"]: r for r in each if "optim/lr" in r}
    assert list(whole) == list(range(1, N + 1))
    third = {r["global_step"]: r for r in records(tmp_path / "third") if "optim/lr" in r}
    assert list(third) == [3, 6]
    for step, record in third.items():
        losses = [whole[s]["loss/out"] for s in range(step - 2, step + 1)]
        assert record["loss/out"] == pytest.approx(sum(losses) / 3, rel=1e-6)
        for key in ("optim/lr", "optim/grad_norm", "optim/total_tokens"):
            assert record[key] == whole[step][key]
        batch = OPTIONS["data.batch_size"] * OPTIONS["data.seq_len"]
        assert record["optim/total_tokens"] == step * 4 * batch


def test_acc_freq_logs_micro_batches(data, tmp_path, monkeypatch):
    seen = []
    inner = app.LoopedTransformer.forward

    def forward(self, *args):
        seen.append(inner(self, *args))
        return seen[-1]

    monkeypatch.setattr(app.LoopedTransformer, "forward", forward)
    options = {"checkpoint.eval.every": 0, "grad_acc_steps": 4, "logging.freq": 2}
    train(write_corpus(data.parent / "no_val", n_val=0), tmp_path, **options, **LOG_EVERY_2ND)

    log = (tmp_path / "train.log").read_text()
    assert log.count(" - step 1/6 ") == 1, "progress before the first record"
    losses = [loss.item() for loss in seen]
    assert len(losses) == 4 * N
    micro = [r for r in records(tmp_path) if r["acc_step"]]
    assert [(r["global_step"], r["acc_step"]) for r in micro] == [(1, 2), (3, 2), (5, 2)]
    assert [r["loss/out"] for r in micro] == [losses[4 * step + 1] for step in (1, 3, 5)]
    whole = [r for r in records(tmp_path) if not r["acc_step"]]
    means = [sum(losses[8 * i : 8 * i + 8]) / 8 for i in range(3)]
    assert [r["loss/out"] for r in whole] == pytest.approx(means, rel=1e-6)


LOG_EVERY_2ND = {"logging.acc_freq": 2}


def test_every_record_has_speed_and_progress(data, tmp_path):
    train(data, tmp_path)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "optim/lr" in line]
    wanted = ("created_at", "global_step", "acc_step", "loss/out", "optim/grad_norm")
    speed = ("wps", "tokens_per_s", "FLOPS", "curr_iter_time", "data_load_time")
    for line in steps:
        assert line.keys() >= {*wanted, *(f"speed/{name}" for name in speed)}
        assert line["speed/FLOPS"] > line["speed/wps"] > 0
        assert 0 < line["speed/data_load_time"] < line["speed/curr_iter_time"]
        n_tokens = OPTIONS["data.batch_size"] * OPTIONS["data.seq_len"]
        per_second = n_tokens / line["speed/curr_iter_time"]
        assert line["speed/tokens_per_s"] == pytest.approx(per_second)


def test_probes_and_profiles_do_not_change_a_run(data, tmp_path):
    profiling = {"run": True, "mem_steps": 0, "profile_warmup": 1, "profile_steps": 1}
    looks = {f"profiling.{name}": value for name, value in profiling.items()}
    train(data, tmp_path / "observed", probe_freq=2, grad_acc_steps=2, **looks)
    train(data, tmp_path / "alone", grad_acc_steps=2)
    got, want = tensors(tmp_path / "observed", N), tensors(tmp_path / "alone", N)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    seen = records(tmp_path / "observed")
    probed = [record for record in seen if "layers/grad_norm/0" in record]
    assert [record["global_step"] for record in probed] == [0, 2, 4]
    alone = records(tmp_path / "alone")
    names = [key for key in alone[0] if key.startswith(("model/", "environment/"))]
    facts = {key: alone[0].pop(key) for key in names}
    assert f"torch {torch.__version__.partition('+')[0]}" in facts["environment/versions"]
    assert facts.items() <= probed[0].items(), "in the first record only"
    assert [record for record in seen if record not in probed] == alone

    probe = (tmp_path / "observed" / "probe" / "probe.0.jsonl").read_text().splitlines()
    assert [json.loads(line)["meta"]["global_step"] for line in probe] == [0, 2, 4]
    (trace,) = (tmp_path / "observed" / "profiling").glob("trace_*.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert not (tmp_path / "alone" / "probe").exists()
    assert not (tmp_path / "alone" / "profiling").exists()


def test_total_tokens_counts_across_a_resume(data, tmp_path):
    with stopped_after(3):
        train(data, tmp_path, grad_acc_steps=2)
    train(data, tmp_path)
    batch = OPTIONS["data.batch_size"] * OPTIONS["data.seq_len"]
    n_tokens = column(tmp_path, "optim/total_tokens")
    assert n_tokens == [batch * n for n in (2, 4, 6, 7, 8, 9)]
    (flops,) = column(tmp_path, "model/flops_per_token")
    assert column(tmp_path, "optim/total_flops") == [flops * n for n in n_tokens]
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    elapsed = [line["time/elapsed"] for line in lines if "time/elapsed" in line]
    assert len(elapsed) == 6 and elapsed == sorted(elapsed) and elapsed[0] > 0


def test_a_checkpoint_without_flops_and_seconds_gets_the_flops_of_its_tokens(
    data, tmp_path, monkeypatch
):
    inner = TrainState.state_dict

    def as_before(self):
        return {k: v for k, v in inner(self).items() if k not in ("n_flops", "seconds", "n_gates")}

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "state_dict", as_before)
        train(data, tmp_path, steps=2)
    train(data, tmp_path, steps=4)
    (flops,) = column(tmp_path, "model/flops_per_token")
    n_tokens = column(tmp_path, "optim/total_tokens")
    assert column(tmp_path, "optim/total_flops") == [flops * n for n in n_tokens]
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert ["time/elapsed" in r for r in lines if "loss/out" in r] == [True, True, False, False]


def test_no_secret_is_written(data, tmp_path, monkeypatch, capfd):
    # random, since the run copies the code and so this file
    secrets = {name: token_hex(16) for name in ("WANDB_API_KEY", "MY_TOKEN")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    options = {"name": "run ${oc.env:WANDB_API_KEY}", "steps": 2}
    options["checkpoint.eval.every"] = 1
    with stopped_after(1):
        train(data, tmp_path, keep_code=True, **options)
    train(data, tmp_path, **options, **{"profiling.trace_folder": "${oc.env:MY_TOKEN}"})

    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    out, err = capfd.readouterr()
    written = {**files, Path("output"): (out + err).encode()}
    for secret in secrets.values():
        assert [file for file, text in written.items() if secret.encode() in text] == []
    assert b"run <WANDB_API_KEY hidden>" in files[tmp_path / "config.yaml"]
    log = files[tmp_path / "train.log"]
    assert b"changed since the checkpoint: profiling.trace_folder" in log
    assert b"changed since the checkpoint: name" not in log


def test_a_run_keeps_the_code_of_its_start(data, tmp_path):
    options = {**SMALL, "checkpoint.eval.every": 1}
    with stopped_after(1):
        train(data, tmp_path, keep_code=True, **options, steps=2)
    kept = tmp_path / "code" / "apps" / "LT2" / "train.py"
    assert kept.read_bytes() == Path(app.__file__).read_bytes()
    version = json.loads((tmp_path / "code_version.json").read_text())
    root = Path(app.__file__).parents[2]
    assert version == asdict(code_version(root)) | {"root": str(root)}
    kept.write_text("# as it was")
    train(data, tmp_path, keep_code=True, **options, steps=2)
    assert kept.read_text() == "# as it was"
    assert not list(tmp_path.glob(".code*"))


# ---- changed options at a resume


def test_a_resume_logs_changed_options(data, tmp_path):
    with stopped_after(2):
        train(data, tmp_path)
    train(data, tmp_path, **{"optim.weight_decay": 0.2, "data.load_async": True})
    log = (tmp_path / "train.log").read_text()
    assert "config changed since the checkpoint: optim.weight_decay: 0.1 -> 0.2" in log
    assert "weight_decay: 0.1" in (tmp_path / "config.before_step_2.yaml").read_text()
    assert "weight_decay: 0.2" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    "option, value, saved",
    [("data.seq_len", 16, 32), ("data.batch_size", 1, 2), ("data.seed", 8, 7)],
)
def test_changed_data_options_are_user_errors_and_nothing_is_written(
    data, tmp_path, option, value, saved
):
    with stopped_after(2):
        train(data, tmp_path)
    before = fingerprint(tmp_path)
    with pytest.raises(UserError, match=f"{option}.* {value}.* {saved}"):
        train(data, tmp_path, **{option: value})
    after = fingerprint(tmp_path)
    for name in ("train.log", ".lock", "checkpoints/.lock"):
        before.pop(name, None), after.pop(name, None)
    assert after == before
