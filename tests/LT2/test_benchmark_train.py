"""Test the training benchmark on two ranks: one row per combination, and its collectives."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from apps.LT2.scripts.benchmark_train import (
    COLUMNS,
    Row,
    format_line,
    format_row,
    kernel_kind,
    legend,
    main,
    variants,
)
from apps.LT2.training.trainer import Trainer
from lingua.errors import UserError
from tests.lingua.dist_utils import run_ranks
from tests.LT2.tiny_run import OPTIONS, clean_process, write_corpus

pytestmark = pytest.mark.slow

RECIPE = "apps/LT2/configs/600M/debug.yaml"
N_LAYERS, SEQLEN = 1, 32


def options_of(data: Path) -> list[str]:
    model = {k: v for k, v in OPTIONS.items() if k.startswith(("model.", "data.", "distributed."))}
    model |= {"model.n_layers": N_LAYERS, "model.attention_pattern": "full"}
    shared = {"data.root_dir": data, "data.sources": "{text: 1.0}", "data.seq_len": SEQLEN}
    options = model | shared | {"distributed.fsdp_type": "full_shard", "grad_acc_steps": 2}
    return [*(f"{k}={v}" for k, v in options.items()), "distributed.compile=false"]


def measure(rank: int, world_size: int, data: Path) -> str:
    argv = [RECIPE, *options_of(data), "model.kda.conv_size=2", "distributed.cuda_graph=true"]
    argv += ["--vary", "distributed.tp_size=1,2", "--vary", "model.loop_count=2"]
    freed = []
    with pytest.MonkeyPatch.context() as patch, clean_process():
        patch.setattr(Trainer, "free_graphs", lambda self: freed.append(self))
        with redirect_stdout(io.StringIO()) as out:
            main([*argv, "--steps", "3", "--warmup", "1", "--profile"])
    assert len(freed) == 2  # of each row, else NCCL waits for them
    return out.getvalue()


def test_ranks_are_measured_together(tmp_path):
    first, second = run_ranks(2, measure, write_corpus(tmp_path / "data"))
    assert second == "", "one rank tells"
    assert "model.loop_count=2: model.kda has no effect" in first
    assert first.count("cuda_graph=true has no effect with distributed.tp_size=2") == 1
    result = json.loads(first.splitlines()[-1])
    rows = result["rows"]
    assert result["argv"][0] == RECIPE and "model.kda.conv_size=2" in result["overrides"]
    assert {(row["seq_len"], row["batch_size"]) for row in rows} == {(SEQLEN, 2)}
    assert_table(first.splitlines(), [row["recipe"] for row in rows])
    assert [row["problem"] for row in rows] == [""] * 2
    assert [row["recipe"].split()[1:] for row in rows] == [
        [f"distributed.tp_size={tp}", "model.loop_count=2"] for tp in (1, 2)
    ]
    tokens = 2 * 2 * SEQLEN  # rows, micro-batches
    assert [row["tokens_per_step"] for row in rows] == [2 * tokens, tokens]
    sharded, split = (row["collectives"] for row in rows)
    assert sharded["allgather_base"] == sharded["reduce_scatter_base"] == N_LAYERS + 1
    # Tensor parallelism needs all-reduces in every loop: two per layer, there and back.
    assert split["allreduce"] - sharded["allreduce"] >= 2 * 2 * 2 * 2 * N_LAYERS


def assert_table(lines: list[str], names: list[str]) -> None:
    """Check that each row has a cell below each heading, separated by two or more blanks."""
    head = next(i for i, line in enumerate(lines) if line.startswith("recipe"))
    assert lines[head - 2].startswith("ranks: 2; ")
    assert "tokens/s: all ranks together" in lines[head - 2]
    starts = ("recipe", "debug")
    table = [re.split(r" {2,}", line) for line in lines[head:] if line.startswith(starts)]
    assert [row[0] for row in table] == ["recipe", *names]
    assert {len(row) for row in table} == {len(COLUMNS) + 1}
    assert table[0][1:] == list(COLUMNS)


def test_columns_stand_below_their_headings_whatever_a_name_s_length():
    gpu = {"mfu": 0.5, "peak_gib": 78.125, "activations_gib": 1.0, "peak_activations_gib": 2.5}
    rows = [
        Row("short", 1_234_500_000, 8, 1_234_567.0, (1_234_000.0, 1_235_000.0), **gpu),
        Row(
            "longer " + "model.loop_count=4 " * 5, first_step_s=12.34, compiled=True, graph_breaks=3
        ),
    ]
    width = len(rows[1].recipe)
    head, first, second = (
        format_line("recipe", width, COLUMNS), *(format_row(row, width) for row in rows)
    )  # fmt: skip
    ends = [head.index(name) + len(name) for name in COLUMNS]
    for line in (first, second):
        assert len(line) == len(head)
        assert all(line[end - 1] != " " and line[end : end + 2].strip() == "" for end in ends)
    cells = re.split(r" {2,}", first)
    assert cells[1:7] == ["1234.5M", "1234567", "1234000-1235000", "50.0%", "78.12 GiB", "1.00 GiB"]
    assert re.split(r" {2,}", second[width:])[4:10] == ["-", "-", "-", "-", "12.3 s", "3"]
    assert format_row(Row("short", problem="no memory"), 7) == "short    no memory"
    assert all(f"{name}:" in legend(1) for name in ("body", "memory", "kept", "peak", "breaks"))


@pytest.mark.parametrize(
    "name",
    [
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "_gated_norm_backward_kernel",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, true>",
        "void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float>",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>",
    ],
)
def test_norms_are_not_the_gradient_norm(name):
    assert kernel_kind(name) == "norms and gates"


def test_a_tokenizer_s_file_is_needed(tmp_path):
    """Unlike benchmark_prefill, which uses Llama 3's vocabulary without one."""
    gone = ["data.tokenizer.name=hf", f"data.tokenizer.path={tmp_path}/gone.json"]
    with pytest.raises(UserError, match="data.tokenizer.path=.*gone.json"):
        main([RECIPE, *options_of(write_corpus(tmp_path)), *gone])


def test_variants_are_all_combinations():
    assert variants([]) == [[]]
    assert variants(["a=1,2", "b=x"]) == [["a=1", "b=x"], ["a=2", "b=x"]]
    with pytest.raises(UserError, match="--vary a: must be key=value,value"):
        variants(["a"])
