"""What `apps.LT2.describe` prints, and how it makes models equal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apps.LT2.describe import main, parse, read_config
from apps.LT2.flops import train_flops_per_token
from apps.LT2.matching import QUANTITIES, match_model
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs, build_on_meta
from lingua.errors import UserError
from lingua.slurm.sizes import read_size
from tests.LT2.golden import CONFIGS

FULL, HYBRID = (
    f"config={CONFIGS}/1B/looped_{name}_1B.yaml" for name in ("pure_full", "hybrid_gdn_4to1")
)
DEBUG = f"config={CONFIGS}/600M/debug.yaml"


def described(capsys, *argv: str) -> dict:
    main([*argv, "format=json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "quantity, by", [("parameters", "n_layers"), ("parameters", "ffn"), ("flops", "dim")]
)
def test_match_prints_overrides_that_make_models_equal(capsys, quantity, by):
    small = ("model.dim=256", "model.n_heads=4", "model.vocab_size=1000")
    hybrid = described(capsys, FULL, HYBRID, *small, f"match={quantity}", f"by={by}")
    overrides = hybrid["looped_hybrid_gdn_4to1_1B"]["overrides"]
    assert overrides and overrides[0].startswith("model.")
    first, second = (
        read_config(config.removeprefix("config="), options)
        for config, options in ((FULL, small), (HYBRID, (*small, *overrides)))
    )
    want, got = (
        QUANTITIES[quantity](build_on_meta(args.model), args.data.seq_len)
        for args in (first, second)
    )
    assert got == pytest.approx(want, rel=0.03)


def test_a_match_leaves_equal_models_unchanged(capsys):
    equal = described(
        capsys, DEBUG, DEBUG.replace("600M/", "600M/../600M/"), "match=parameters", "by=ffn"
    )
    assert [one["overrides"] for one in equal.values()] == [[], []]


def test_a_match_ignores_what_no_size_can_make_equal(capsys):
    """The gates of more loops are fewer parameters than the smallest step of the FFN."""
    models = [
        build_on_meta(replace(read_config(DEBUG.removeprefix("config="), []).model, loop_count=n))
        for n in (2, 4)
    ]
    target, given = (QUANTITIES["parameters"](model, 256) for model in models)
    assert given > target
    options = match_model(models[1].args, target, quantity="parameters", by="ffn", seqlen=256)
    assert options == {}


def test_sweeps_read_the_sizes(capsys):
    size = read_size(described(capsys, DEBUG)["debug"])
    assert (size.layout, size.depth) == ("gdn*4,full", "5x2")
    args = read_config(DEBUG.removeprefix("config="), [])
    model = build_on_meta(args.model)
    assert size.body == QUANTITIES["parameters"](model, args.data.seq_len) < size.parameters
    assert size.flops == QUANTITIES["flops"](model, args.data.seq_len)


def test_a_match_that_no_size_meets_names_the_closest(capsys):
    with pytest.raises(UserError, match=r"looped_.*model\.n_layers=\d"):
        main([DEBUG, HYBRID, "match=parameters"])
    assert not capsys.readouterr().out


def test_a_gate_without_exits_is_refused():
    with pytest.raises(UserError, match=r"^model\.loop_loss=gate with model\.loop_count=1"):
        main([DEBUG, "model.loop_count=1", "model.loop_loss=gate"])


@pytest.mark.parametrize(
    "argv, option",
    [
        ([], "config"),
        ([DEBUG, "match=params"], "match"),
        ([DEBUG, "match=flops"], "config"),
        ([DEBUG, "by=width"], "by"),
        ([DEBUG, "by=dim"], "match"),
        ([DEBUG, "mtach=flops"], "did you mean match"),
        ([DEBUG, "ngpu=0"], "ngpu"),
        ([DEBUG, "bandwidth=0"], "bandwidth"),
    ],
)
def test_mistakes_name_the_option(argv, option):
    with pytest.raises(UserError, match=option):
        parse(argv)


def test_recipes_may_be_given_without_config():
    path = DEBUG.removeprefix("config=")
    given, overrides = parse([path, "model.dim=64", "seed=1", HYBRID, "format=json"])
    assert given.config == [path, HYBRID.removeprefix("config=")] and given.format == "json"
    assert overrides == ["model.dim=64", "seed=1"]


def test_training_flops_are_the_mean_over_steps_and_memory_that_of_the_largest_t(capsys):
    def debug(*options: str) -> dict:
        return described(capsys, DEBUG, *options)["debug"]

    one, four = (debug(f"model.loop_count={T}") for T in (1, 4))
    mixed = debug("model.loop_count=4", "model.loop_schedule=1@0, 4@0.25")
    assert mixed["training loops"] == {"1": 0.25, "4": 0.75}
    flops, low, high = (d["flops"]["training, per token"] for d in (mixed, one, four))
    assert flops == pytest.approx(0.25 * low + 0.75 * high, abs=1)
    for key in ("memory", "cache", "decode", "layout"):
        assert mixed[key] == four[key]
    cut = debug("model.loop_count=4", "model.loop_bptt=1")
    assert cut["flops"]["training, per token"] == pytest.approx(low + (high - low) / 3, abs=1)
    assert cut["memory"]["kept"] == one["memory"]["kept"]


def test_a_tensor_parallel_size_must_fit():
    with pytest.raises(UserError, match=r"distributed\.tp_size"):
        main([DEBUG, "ngpu=3", "distributed.tp_size=3"])


def test_the_table_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main([FULL, HYBRID])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("parameters" in line and "-" in line for line in lines)


def test_flops_equal_torchs_counter_but_for_masked_keys():
    """The plain attention multiplies all pairs of tokens; ours are the visible ones."""
    n_layers, n_loops, dim, seqlen = 2, 3, 32, 16
    args = LoopedTransformerArgs(
        dim=dim, n_heads=2, n_layers=n_layers, loop_count=n_loops, vocab_size=50, attn_impl="naive"
    )
    model = LoopedTransformer(args)
    model.init_weights()
    tokens = torch.randint(50, (1, seqlen))
    with FlopCounterMode(display=False) as counter:
        model(tokens, target=tokens).backward()
    hidden = seqlen * (seqlen - 1) // 2
    masked = 3 * n_layers * n_loops * 4 * dim * hidden
    want = counter.get_total_flops() - masked
    assert seqlen * train_flops_per_token(model, seqlen) == pytest.approx(want, rel=2e-3)
