"""Two GPUs train a compiled hybrid as one does: data, heads and vocabulary shared out, weights
sharded."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TextIO, cast

import pytest
import torch

from tests.LT2.tiny_run import write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 540  # seconds of one run; compiling takes most of them
LOSS = 1e-2  # relative: bf16 activations, whose sums over heads are rounded once a rank


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
    """Standard output of `module` under torchrun, with untuned kernels. What it and its errors say
    is passed on as it comes, so that `pytest -s` shows where a run that hangs has got to."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    command = [sys.executable, "-m", *launcher, "-m", "tests.gpu.untuned", module, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        # SIGTERM and not SIGKILL: torchrun ends its ranks, which would keep the GPUs without it.
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


def test_two_gpus_share_heads_or_data(tmp_path):
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
        # Another half of the text goes to each rank, and a new model is near log(vocabulary).
        assert row["first_loss"] == pytest.approx(alone["first_loss"], rel=0.1)
        assert row["collectives"]["AllGather"] == row["collectives"]["ReduceScatter"] == 5 + 1
    kept = [row["activations_gib"] for row in sharded]
    assert kept[0] > kept[1] > kept[2] > kept[3]


def test_two_gpus_share_the_vocabulary(tmp_path):
    """A large one, which takes most of the memory, in two chunks of tokens; tied and not."""
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
        # With all of the vocabulary on each GPU it would be above 0.9.
        assert half["peak_gib"] < 0.7 * whole["peak_gib"]
