"""What a training budget buys: against the model's own FLOPs, memory and traffic."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from apps.LT2.describe import main, read_config
from apps.LT2.flops import cache_bytes, count_parameters, step_traffic, train_flops_per_token
from apps.LT2.inference.load import cast_for_inference
from apps.LT2.scripts.budget import MFU
from apps.LT2.transformer import build_on_meta
from lingua.errors import UserError
from tests.LT2.golden import CONFIGS

DEBUG = f"{CONFIGS}/600M/debug.yaml"
# Softmax attention, so that a cache depends on the number of layers alone.
MODEL = [
    *("model.dim=128", "model.n_layers=8", "model.n_heads=4", "model.vocab_size=500"),
    *("model.mixer=full", "model.attention_pattern=null", "model.loop_count=2"),
    *("data.seq_len=64", "data.batch_size=2", "grad_acc_steps=3"),
]


def bought(capsys, *options: str) -> dict:
    main([DEBUG, *MODEL, "format=json", *options])
    return json.loads(capsys.readouterr().out)["debug"]


@pytest.fixture(scope="module")
def args():
    return read_config(DEBUG, MODEL)


def test_a_budget_of_flops(capsys, args):
    counts = "loop_counts=[1, 2, 4]"
    found = bought(capsys, "flops=1e15", "gpus=4", "peak=100", "bandwidth=2", counts)
    models = found["models"]
    assert [(m["kind"], m["loop_count"]) for m in models] == [
        (kind, T) for kind in ("parameters", "flops", "cache") for T in (1, 2, 4)
    ]
    quantities = {
        "parameters": lambda m: count_parameters(m).total - count_parameters(m).embedding,
        "flops": lambda m: train_flops_per_token(m, 64),
        "cache": lambda m: cache_bytes(m, 64, torch.bfloat16),
    }
    recipe = build_on_meta(args.model)
    for m in models:
        own = replace(args.model, loop_count=m["loop_count"], **m["changes"])
        model = build_on_meta(own)
        cost = train_flops_per_token(model, 64)
        measure = quantities[m["kind"]]
        assert measure(model) == pytest.approx(measure(recipe), rel=0.03)
        assert m["flops_per_token"] == cost and m["tokens"] == pytest.approx(1e15 / cost)
        assert m["steps"] == int(m["tokens"] / (2 * 3 * 64 * 4))
        assert m["hours"] == pytest.approx(1e15 / (4 * 100e12 * MFU) / 3600)
        cast_for_inference(model, torch.bfloat16)
        moved = step_traffic(model, 8, 4096, torch.bfloat16).total
        assert m["decode"]["4096"] == pytest.approx(8 * 2e12 / moved)
    by_loops = [m["changes"] for m in models if m["kind"] == "cache"]
    assert by_loops == [{"n_layers": 16}, {}, {"n_layers": 4}]
    main([DEBUG, *MODEL, "model.loop_count=4", "gpus=4", "format=json"])
    memory = json.loads(capsys.readouterr().out)["debug"]["memory"]
    assert models[2]["memory"] == memory["peak"][memory["mode"]]


def test_budgets_of_tokens_and_hours(capsys):
    one = "loop_counts=[2]"
    tokens = bought(capsys, "tokens=1e8", "mfu=0.5", "peak=100", one)["models"][0]
    assert (tokens["tokens"], tokens["steps"]) == (1e8, int(1e8 / 384))
    assert tokens["flops"] == 1e8 * tokens["flops_per_token"]
    assert tokens["hours"] == pytest.approx(tokens["flops"] / 0.5e14 / 3600)
    hours = bought(capsys, f"hours={tokens['hours']!r}", "mfu=0.5", "peak=100", one)["models"][0]
    assert hours["tokens"] == pytest.approx(1e8)
    two = bought(capsys, f"hours={tokens['hours']!r}", "mfu=0.5", "peak=100", "gpus=2", one)
    assert two["models"][0]["tokens"] == pytest.approx(2e8)


def test_a_quantity_that_no_size_matches_is_a_note(capsys):
    found = bought(capsys, "flops=1e15", "model.n_layers=1", "model.dim=16", "loop_counts=[2, 7]")
    kinds = {(m["kind"], m["loop_count"]) for m in found["models"]}
    assert ("parameters", 7) in kinds and ("cache", 7) not in kinds
    assert any("7 loops" in note and "cache" in note for note in found["notes"])


def test_the_table_fits_a_terminal_and_names_the_mfu(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    main([DEBUG, *MODEL, "flops=1e15", "loop_counts=[1, 2]", f"out={tmp_path}/b.png"])
    text = capsys.readouterr().out
    assert max(map(len, text.replace(str(tmp_path), "").splitlines())) <= 100
    assert "with bandwidth=3.35 TB/s" in text
    assert "46.7%" in text and "docs/benchmarks/train_h200" in text and "2*" in text
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    main([DEBUG, *MODEL, "flops=1e15", "loop_counts=[2]", "mfu=0.3"])
    assert "30.0% (given)" in capsys.readouterr().out


def test_patterns_with_a_segment_per_loop_have_their_own_number(capsys):
    segments = "model.attention_pattern=full->8"
    found = bought(capsys, "flops=1e15", segments)
    assert {m["loop_count"] for m in found["models"]} == {2}
    with pytest.raises(UserError, match=r"loop_counts=\[1, 2\].*2 segments"):
        bought(capsys, "flops=1e15", segments, "loop_counts=[1, 2]")


@pytest.mark.parametrize(
    "options, named",
    [
        (["flops=1e1"], r"debug: flops=10 buys .*e-\d+ steps of 1 loops"),
        (["flops=1e91"], r"flops=1e\+91"),
        (["flops=1e1x"], "flops=1e1x"),
        (["flops=-1e15"], "flops=-1e"),
        (["tokens=0"], "tokens=0"),
        (["hours=1e9"], "hours="),
        (["flops=1e15", "tokens=1e9"], "flops and tokens"),
        (["flops=1e15", "loop_counts=[]"], r"loop_counts=\[\]"),
        (["flops=1e15", "loop_counts=[0]"], r"loop_counts=\[0\]"),
        (["flops=1e15", "loop_counts=[1.5]"], "loop_counts.*1.5"),
        (["flops=1e15", "mfu=42"], "mfu=42"),
        (["flops=1e15", "peak=0"], "peak=0"),
        (["flops=1e15", "gpus=0"], "ngpu=0"),
        (["flops=1e15", "out=x.txt"], "out=x.txt"),
        (["flops=1e15", "out=pyproject.toml/x.png"], "pyproject"),
        (["flops=1e15", "match=flops", DEBUG], "match"),
        (["mfu=0.3"], "mfu"),
        (["loop_counts=[1]"], "loop_counts"),
    ],
)
def test_mistakes_name_the_option(options, named):
    with pytest.raises(UserError, match=named):
        main([DEBUG, *MODEL, *options])
