"""Test the inference benchmark on a CPU: tasks, rows, the table, the JSON, and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apps.LT2 import benchmark_prefill
from apps.LT2.benchmark import timing as measure
from apps.LT2.benchmark.inference_cost import (
    Decode,
    Plan,
    Prefill,
    Timing,
    decode_cost,
    measure_point,
    paired_ratio,
    prefill_cost,
    time_alternately,
)
from apps.LT2.benchmark.timing import Ceilings, Spread, is_out_of_memory
from apps.LT2.benchmark_prefill import LLAMA3_VOCAB, main, read_subjects
from apps.LT2.block import Block
from apps.LT2.flops import prefill_flops, step_traffic
from apps.LT2.scripts import plot_benchmark
from apps.LT2.transformer import LoopedTransformer
from lingua.errors import UserError
from tests.LT2.tiny import CACHE_KINDS, tiny_model
from tests.tolerances import FP32_MODEL, assert_same

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PLAN = Plan(
    repeats=3, warmup=1, decode_tokens=2, prefill_chunk=None, compiled=False, cuda_graph=False
)
CEILINGS = Ceilings(copy_bytes_per_s=1e9, matmul_flops=1e10, datasheet_flops=4e10)
FAST = ["--repeats", "2", "--warmup", "1", "--decode-tokens", "2"]


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setattr("apps.LT2.benchmark_prefill.measure_ceilings", lambda *_: CEILINGS)


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml")


def write_recipe(path: Path, **model) -> Path:
    shape = {"dim": 32, "n_layers": 1, "n_heads": 2, "multiple_of": 16, "loop_count": 2}
    path.write_text(json.dumps({"model": {**shape, "mixer": "gdn", **model}}))  # JSON is YAML
    return path


def run(capsys, *argv) -> tuple[dict, str]:
    """Run the program. Return the JSON of its last line, and the lines before it."""
    main([*map(str, argv), *FAST])
    *table, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(table)


# ---- tasks


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_prefill_leaves_the_whole_prompt_in_the_cache(kind, chunk):
    model = tiny_model(kind, loop_count=2)
    task = Prefill(model, 2, 8, Plan(1, 1, 1, chunk, False, False))
    for _ in range(2):  # each run starts again
        task.prepare()
        task.run()
    assert task.cache.lengths == [8, 8]
    plain = model.init_cache(2, 8)
    model.prefill(task.tokens_BT, plain)
    for got, want in zip(task.cache.mixers[-1], plain.mixers[-1], strict=True):
        for a, b in zip(got.snapshot(), want.snapshot(), strict=True):
            assert_same(a, b, FP32_MODEL)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_each_decode_run_steps_from_the_asked_length(kind):
    model = tiny_model(kind, loop_count=2)
    task = Decode(model, 2, 8, PLAN)
    for _ in range(3):
        task.prepare()
        assert task.cache.lengths == [8, 8]
        task.run()
        assert task.cache.lengths == [10, 10]


def test_shares_by_hand():
    model = tiny_model("hybrid", loop_count=2)
    prefill = prefill_cost(Timing([0.5, 0.25, 1.0]), model, 3, 100, CEILINGS)
    assert prefill.ms == 500 and prefill.tokens_per_s == 600
    assert prefill.quartiles_ms == (375, 750)
    assert prefill.share == pytest.approx(3 * prefill_flops(model, 100) / 0.5 / 1e10)
    assert prefill.datasheet_share == pytest.approx(prefill.share / 4)

    decode = decode_cost(Timing([0.5]), model, 3, 100, PLAN, CEILINGS)
    assert decode.ms == 250 and decode.tokens_per_s == 12  # two steps a run, three sequences
    moved = step_traffic(model, 3, 100, torch.float32).total
    assert decode.share == pytest.approx(moved / 0.25 / 1e9)
    assert decode.datasheet_share is None


def test_only_the_last_token_of_a_prompt_pays_for_the_head():
    small, large = (tiny_model("gdn", loop_count=1, vocab_size=n) for n in (100, 200))
    assert prefill_flops(large, 50) - prefill_flops(small, 50) == 2 * 32 * 100


def test_ratios_are_of_pairs():
    first, second = Timing([2.0, 4.0, 9.0]), Timing([1.0, 2.0, 3.0])
    assert paired_ratio(first, second) == Spread(2.0, 2.0, 2.5)
    assert paired_ratio(first, Timing([])) is None


class Recorder:
    def __init__(self, name: str, log: list[str], fails_at: int | None = None):
        self.name, self.log, self.fails_at, self.runs = name, log, fails_at, 0

    def prepare(self) -> None:
        self.log.append(f"prepare {self.name}")

    def run(self) -> None:
        self.runs += 1
        if self.runs == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.log.append(self.name)


def test_batches_that_do_not_read_8_bit_weights_are_named(
    capsys, monkeypatch, recipe, quick_ceilings
):
    monkeypatch.setattr(benchmark_prefill, "check_weights", lambda *_: None)  # it needs a GPU
    argv = ["--config", recipe, "--seq-len", 4, "--weights", "int8", "--batch-size", 1, 17]
    _, table = run(capsys, *argv)
    assert table.count("weights=int8: steps of 17 sequences read 16-bit weights") == 1
    assert "steps of 1 seq" not in table


def test_models_take_turns_and_change_places():
    log: list[str] = []
    timings = time_alternately([lambda: Recorder("a", log), lambda: Recorder("b", log)], CPU, PLAN)
    assert [x for x in log if len(x) == 1] == list("ab" + "ab" + "ba" + "ab")
    assert log[0::2] == [f"prepare {x}" for x in log[1::2]]  # before every run
    assert [len(timing.seconds) for timing in timings] == [3, 3]


@pytest.mark.parametrize("fails_at", [1, 3])
def test_without_memory_for_one_the_other_goes_on(fails_at):
    log: list[str] = []
    makers = [lambda: Recorder("a", log, fails_at), lambda: Recorder("b", log)]
    first, second = time_alternately(makers, CPU, PLAN)
    assert first.seconds == [] and len(second.seconds) == 3


def test_another_error_is_no_row():
    def fail() -> Recorder:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        time_alternately([fail], CPU, PLAN)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
    try:
        try:
            raise torch.OutOfMemoryError("x")
        finally:
            raise RuntimeError("capture was invalidated")
    except RuntimeError as error:
        assert is_out_of_memory(error)


def test_prefill_without_memory_still_has_a_decode(monkeypatch):
    model = tiny_model("gdn", loop_count=1)

    def prefill(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LoopedTransformer, "prefill", prefill)
    (row,), ratio = measure_point({"m": model}, 1, 4, PLAN, CEILINGS)
    assert row.prefill.problem == "out of memory" and row.prefill.ms is None
    assert row.decode.ms is not None and row.decode.problem == ""
    assert ratio is None


# ---- the command


def test_rows_are_configs_by_batch_sizes_by_lengths(capsys, recipe, quick_ceilings):
    other = write_recipe(recipe.with_name("other.yaml"), mixer="full", n_kv_heads=1)
    argv = ["--config", recipe, f"config={other}", "--seq-len", 4, 8, "--batch-size", 1, 3]
    result, table = run(capsys, *argv, "model.loop_count=3")
    assert [(r["config"], r["batch_size"], r["seqlen"]) for r in result["rows"]] == [
        (config, b, n) for config in ("tiny", "other") for b in (1, 3) for n in (4, 8)
    ]
    assert result["configs"][0]["args"]["loop_count"] == 3  # overrides apply to all configs
    assert result["configs"][1]["args"]["loop_count"] == 3
    keys_and_values = 3 * 2 * 16 * 4  # loops; one head of 16 in fp32
    assert result["rows"][-1]["cache_mib"] == 8 * keys_and_values / 2**20
    for row in result["rows"]:
        for cost in (row["prefill"], row["decode"]):
            assert cost["ms"] > 0 and cost["share"] > 0 and cost["problem"] == ""
            low, high = cost["quartiles_ms"]
            assert low <= cost["ms"] <= high
    assert result["ceilings"]["matmul_flops"] == 1e10
    assert result["torch"] == torch.__version__ and "commit" in result and result["device"]
    assert table.count("\ntiny ") == 4 and "T = 3" in table


@pytest.mark.parametrize("once, dynamic", [(False, [False, False]), (True, [None, True])])
def test_compiled_code_is_for_one_point_or_for_all(monkeypatch, recipe, once, dynamic):
    found: list = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: found.append("reset"))
    monkeypatch.setattr(
        benchmark_prefill, "compile_layers", lambda model, name, *, dynamic: found.append(dynamic)
    )
    plan = replace(PLAN, compiled=True, compile_once=once, repeats=1)
    (subject,) = read_subjects([str(recipe)], ["model.vocab_size=99"])
    model = benchmark_prefill.build(subject, CPU, torch.float32, plan)
    for n in (4, 8):
        measure_point({"tiny": model}, 1, n, plan, CEILINGS)
    assert found == [*dynamic, *["reset"] * (0 if once else 2)]


def test_the_measured_cache_is_the_counted_one(recipe):
    once = replace(PLAN, repeats=1, warmup=0)
    for kind in CACHE_KINDS:
        model = tiny_model(kind, loop_count=2)
        (row,), _ = measure_point({kind: model}, 2, 16, once, CEILINGS)
        held = [t for loop in model.init_cache(1, 16).mixers for m in loop for t in m.snapshot()]
        assert row.cache_mib * 2**20 == sum(t.nbytes for t in held if t.is_floating_point())


def test_compare_prints_how_much_faster_the_second_is(capsys, monkeypatch, recipe, quick_ceilings):
    ran = []
    for name in ("prefill", "step"):
        inner = getattr(Block, name)
        monkeypatch.setattr(Block, name, lambda *a, f=inner, **o: ran.append(1) or f(*a, **o))

    def layers_run(action, device) -> float:  # a fixed clock
        ran.clear()
        action()
        return float(len(ran))

    monkeypatch.setattr("apps.LT2.benchmark.inference_cost.seconds_of", layers_run)
    slow = write_recipe(recipe.with_name("slow.yaml"), loop_count=12)
    result, table = run(capsys, "--compare", slow, recipe, "--seq-len", 4)
    assert [row["config"] for row in result["rows"]] == ["slow", "tiny"]
    assert result["ratios"] == [
        {"batch_size": 1, "seqlen": 4, "prefill": [6, 6, 6], "decode": [6, 6, 6]}
    ]
    assert "tiny, speed relative to slow: prefill 6.000" in table


def test_ceilings_are_bytes_and_flops_over_the_fastest_time(monkeypatch):
    times = iter([9.0, 4.0, 2.0, 8.0, 9.0, 6.0, 5.0, 7.0])
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(measure, "MATMUL_SIZE", {"cpu": 10})
    monkeypatch.setattr(measure, "seconds_of", lambda *_: next(times))
    found = measure.measure_ceilings(CPU, torch.float32, repeats=4)
    assert found == Ceilings(2 * 1000 / 2.0, 2 * 10**3 / 5.0, None)


def test_configs_of_one_name_go_by_their_paths(recipe):
    (recipe.parent / "b").mkdir()
    twin = write_recipe(recipe.parent / "b" / recipe.name)
    names = [s.name for s in read_subjects([str(recipe), str(twin)], [])]
    assert names == [str(recipe), str(twin)]


def test_a_refused_config_is_a_row_among_several_and_an_error_alone(capsys, recipe, quick_ceilings):
    odd = write_recipe(recipe.with_name("odd.yaml"), n_layers=4, attention_pattern="gdn*3")
    result, table = run(capsys, "--config", odd, recipe, "--seq-len", 4)
    assert [row["config"] for row in result["rows"]] == ["tiny"]
    assert "attention_pattern" in result["refused"]["odd"] and "odd  refused:" in table
    with pytest.raises(UserError, match="attention_pattern"):
        main(["--config", str(odd), "--seq-len", "4", *FAST])


def test_an_override_is_for_the_configs_whose_layers_read_it(capsys, recipe, quick_ceilings):
    gdn = write_recipe(recipe.with_name("gdn.yaml"), n_layers=2, mixer="gdn")
    full = write_recipe(recipe.with_name("full.yaml"), n_layers=2, mixer="full")
    shared = ["model.gated_attn=true", "model.gdn.conv_size=2", "--seq-len", 4]
    result, said = run(capsys, "--config", gdn, full, *shared)
    assert "gdn: model.gated_attn=true has no effect" in said
    assert "full: model.gated_attn" not in said and "full: model.gdn has no effect" in said
    assert [row["config"] for row in result["rows"]] == ["gdn", "full"] and not result["refused"]
    of_gdn, of_full = (config["args"] for config in result["configs"])
    assert of_full["gated_attn"] and of_gdn["gdn"]["conv_size"] == 2


def test_the_vocabulary_is_the_tokenizers_or_llamas(recipe, tmp_path):
    (by_bytes,) = read_subjects([str(recipe)], [])
    assert by_bytes.args.vocab_size == 258
    absent = ["data.tokenizer.name=tiktoken", f"data.tokenizer.path={tmp_path}/tokenizer.model"]
    (subject,) = read_subjects([str(recipe)], absent)
    assert subject.args.vocab_size == LLAMA3_VOCAB and "missing" in subject.vocabulary
    (subject,) = read_subjects([str(recipe)], [*absent, "model.vocab_size=99"])
    assert subject.args.vocab_size == 99


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--seq-len", "0"], "--seq-len 0 must be at least 1"),
        (["--batch-size", "1", "0"], "--batch-size 0 must be at least 1"),
        (["--decode-tokens", "0"], "--decode-tokens 0"),
        (["--prefill-chunk", "0"], "--prefill-chunk 0"),
        (["--seq-len", "many"], "--seq-len"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "tpu"], "device=tpu"),
        (["--device", "cuda:99"], "device=cuda:99"),
        (["optim.lr=1"], "optim.lr=1"),
        (["model.lop_count=1"], "lop_count"),
        (["model.attention_pattern=9:9"], "model.attention_pattern='9:9'"),
        (
            ["model.mixer=full", "model.attn_impl=fmha", "--device=cpu"],
            "model.attn_impl=fmha runs on CUDA",
        ),
        (["--config", "no.yaml"], "no.yaml"),
        (["--compare", "a.yaml", "b.yaml"], "--config X.yaml"),
        (["--plot", "/dev/null/folder/image.png"], "--plot=/dev/null/folder"),
        (["--plot", "picture.docx"], "picture.png"),
    ],
)
def test_mistakes_are_one_line_before_any_work(capsys, recipe, argv, words):
    if "--plot" in argv:
        pytest.importorskip("matplotlib")
    with pytest.raises(UserError) as caught:
        main(["--config", str(recipe), *argv])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_nothing_to_measure_is_a_mistake():
    with pytest.raises(UserError, match="--config"):
        main(["--seq-len", "8"])


def test_as_a_program_mistakes_end_with_status_2(recipe, quick_python):
    command = ["-m", "apps.LT2.benchmark_prefill", "--config", str(recipe), "--seq-len", "0"]
    done = quick_python.run(*command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--seq-len 0" in done.stderr and done.stdout == ""


# ---- figures


def row(config: str, batch_size: int, seqlen: int, prefill: float | None, decode: float) -> dict:
    costs = {"prefill": {"tokens_per_s": prefill}, "decode": {"tokens_per_s": decode}}
    return {"config": config, "batch_size": batch_size, "seqlen": seqlen, **costs}


def test_a_line_a_config_and_no_point_without_memory():
    first = {"rows": [row("a", 1, 1024, 10.0, 1.0), row("a", 1, 2048, None, 2.0)]}
    second = {"rows": [row("b", 1, 1024, 30.0, 3.0)]}
    assert plot_benchmark.points([first, second], "prefill") == {"a": {1024: 10}, "b": {1024: 30}}
    assert plot_benchmark.points([first], "decode") == {"a": {1024: 1, 2048: 2}}
    batches = {"rows": [row("a", 1, 1024, 1.0, 1.0), row("a", 8, 1024, 2.0, 2.0)]}
    assert list(plot_benchmark.points([batches], "decode")) == ["a, batch 1", "a, batch 8"]


def test_plot_of_a_run_and_of_its_output(capsys, recipe, quick_ceilings):
    pytest.importorskip("matplotlib")
    figure, joined = recipe.with_name("run.png"), recipe.with_name("joined.png")
    result, table = run(capsys, "--config", recipe, "--seq-len", 4, 8, "--plot", figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert result["options"]["plot"] == str(figure)
    output = recipe.with_name("output.txt")
    output.write_text(f"{table}\n{json.dumps(result)}\n")
    plot_benchmark.main([str(output), "--out", str(joined)])
    assert joined.stat().st_size > 5000
    assert "2 rows" in capsys.readouterr().out
    output.write_text("Killed\n")
    with pytest.raises(UserError, match="output.txt"):
        plot_benchmark.main([str(output), "--out", str(joined)])


def test_options_of_loops_in_training_do_not_matter(tmp_path):
    recipe = write_recipe(tmp_path / "a.yaml", loop_count=4, loop_schedule="1@0, 4@0.5")
    (subject,) = read_subjects([str(recipe)], ["model.vocab_size=99", "model.loop_count=2"])
    model = LoopedTransformer(subject.args)
    assert len(model.inference_layout) == 2 and not model.loop_plan.varies
