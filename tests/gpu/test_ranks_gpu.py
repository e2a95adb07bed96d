"""Two GPUs train a compiled hybrid as one does, with split data, heads or vocabulary."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TextIO, cast

import pytest
import torch

from tests.LT2.tiny_run import SMALL, column, command_line, write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 540  # seconds per run, mostly for compiling
LOSS = 1e-2  # relative; partial sums over heads are rounded to bf16 on each rank


def rows(n_ranks: int, data: Path, *options: str) -> list[dict]:
    arguments = [
        "apps/LT2/configs/600M/debug.yaml",
        *(f"data.root_dir={data}", "data.sources={text: 1.0}", "data.tokenizer.name=bytes"),
        *("model.dim=256", "model.n_heads=2", "model.n_layers=5", "model.loop_count=2"),
        *("distributed.model_dtype=bf16", "distributed.compile=true", "data.seq_len=256"),
        *("--steps", "4", "--warmup", "1", "--profile"),
        *options,
    ]
    output = run_ranks(n_ranks, "apps.LT2.scripts.benchmark_train", *arguments)
    found = json.loads(output.splitlines()[-1])["rows"]
    assert [row["problem"] for row in found] == [""] * len(found)
    return found


def run_ranks(n_ranks: int, module: str, *arguments: str) -> str:
    """Run `module` under torchrun with untuned kernels, and return its stdout.

    The output is also printed as it comes, so that `pytest -s` shows where a run hangs.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    command = [sys.executable, "-m", *launcher, "-m", "tests.gpu.untuned", module, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        # SIGTERM, so that torchrun ends its ranks, which hold the GPUs.
        too_late = threading.Timer(TIME_LIMIT, run.terminate)
        too_late.start()
        lines = []
        try:
            for line in cast(TextIO, run.stdout):
                print(line, end="", flush=True)
                lines.append(line)
            run.wait()
        finally:
            too_late.cancel()
            run.terminate()  # unless it has ended
    assert run.returncode == 0, f"{module} on {n_ranks} GPUs ended with {run.returncode}"
    return "".join(lines)


def test_two_gpus_split_heads_or_data(tmp_path):
    data = write_corpus(tmp_path / "data", n_lines=200)
    (alone,) = rows(1, data, "data.batch_size=4")
    (heads,) = rows(
        2, data, "data.batch_size=4", "distributed.tp_size=2", "distributed.fsdp_type=full_shard"
    )
    assert heads["first_loss"] == pytest.approx(alone["first_loss"], rel=LOSS)
    assert heads["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.1)
    sharded = rows(
        *(2, data, "data.batch_size=2", "distributed.fsdp_type=full_shard"),
        *("--vary", "distributed.activation_checkpointing=none,selective,full,loop"),
    )
    for row in sharded:
        # Ranks read different data, but the first loss is close to log(vocabulary).
        assert row["first_loss"] == pytest.approx(alone["first_loss"], rel=0.1)
        assert row["collectives"]["AllGather"] == row["collectives"]["ReduceScatter"] == 5 + 1
    kept = [row["activations_gib"] for row in sharded]
    assert kept[0] > kept[1] > kept[2] > kept[3]


def test_two_gpus_repeat_a_step_as_a_graph(tmp_path):
    data = write_corpus(tmp_path / "data", n_lines=400)
    eager, graphed = rows(
        *(2, data, "data.batch_size=2", "distributed.fsdp_type=full_shard", "grad_acc_steps=2"),
        *("--steps", "8", "--warmup", "5", "--vary", "distributed.cuda_graph=false,true"),
    )
    for loss in ("first_loss", "last_loss"):
        assert graphed[loss] == pytest.approx(eager[loss], rel=LOSS), loss
    assert graphed["grad_norm"] == pytest.approx(eager["grad_norm"], rel=0.1)
    assert graphed["collectives"] == eager["collectives"]
    assert (eager["cuda_graphs"], graphed["cuda_graphs"]) == (0, 1)


def test_two_gpus_evaluate_the_weights_that_graphs_trained(tmp_path):
    """Evaluations between replays gather the weights. The run ends: its graphs are freed."""
    data, runs = write_corpus(tmp_path / "data", n_lines=200), []
    options = {**SMALL, "model.dim": 128, "steps": 8, "checkpoint.eval.every": 2}
    options |= {"distributed.fsdp_type": "full_shard", "optim.lr": 1e-2}
    for cuda_graph in (False, True):
        run, own = tmp_path / f"run_{cuda_graph}", {"distributed.cuda_graph": cuda_graph}
        run_ranks(2, "apps.LT2.train", *command_line(data, run, {**options, **own}))
        runs.append(column(run, "loss/val"))
    eager, graphed = runs
    assert len(eager) == 4
    assert graphed == pytest.approx(eager, rel=1e-3)
    steps = zip(eager, eager[1:], strict=False)
    assert all(abs(after - before) > 1e-2 * before for before, after in steps)


def test_two_gpus_split_the_vocabulary(tmp_path):
    """The vocabulary takes most of the memory. Tested with and without weight tying."""
    data = write_corpus(tmp_path / "data", n_lines=800)
    options = ("data.batch_size=16", "model.vocab_size=131072")
    varied = ("--vary", "model.weight_tying=false,true")
    alone = rows(1, data, *options, *varied)
    tp = ("distributed.tp_size=2", "distributed.fsdp_type=full_shard")
    shared = rows(2, data, *options, *tp, *varied)
    for whole, half in zip(alone, shared, strict=True):
        for loss in ("first_loss", "last_loss"):
            assert half[loss] == pytest.approx(whole[loss], rel=LOSS), loss
        assert half["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.1)
        # With the whole vocabulary on each GPU it would be above 0.9.
        assert half["peak_gib"] < 0.7 * whole["peak_gib"]
