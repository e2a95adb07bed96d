"""The report of the inference benchmark: verdicts, tables, marks of missing points, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apps.LT2.scripts import plot_benchmark
from apps.LT2.scripts.benchmark_report import CLAIMS, RatioClaim, judge, main
from lingua.args import dataclass_from_dict, load_config_file
from lingua.errors import UserError
from tests.LT2.test_benchmark_prefill import quick_ceilings, recipe, run  # noqa: F401

CONFIGS = Path(__file__).parents[2] / "apps/LT2/configs"


def cost(ms: float | None, n_tokens: int = 1, problem: str = "out of memory") -> dict:
    if ms is None:
        return dict.fromkeys(("ms", "quartiles_ms", "tokens_per_s", "share")) | {"problem": problem}
    quartiles, tokens_per_s = (0.9 * ms, 1.1 * ms), 1000 * n_tokens / ms
    return {
        **{"ms": ms, "quartiles_ms": quartiles, "tokens_per_s": tokens_per_s, "share": 0.5},
        "problem": "",
    }


def row(config: str, batch: int, seqlen: int, ms: float | None, cache_mib: float = 1.0) -> dict:
    return {
        **{"config": config, "batch_size": batch, "seqlen": seqlen, "cache_mib": cache_mib},
        "prefill": cost(ms, batch * seqlen),
        "decode": cost(ms, batch),
    }


FAST, SLOW = row("a", 1, 8, 1.0), row("b", 1, 8, 3.0, cache_mib=4.0)
ROWS = [FAST, SLOW, row("a", 2, 8, 1.0), row("a", 1, 16, 1.0), row("a", 1, 32, None)]


@pytest.mark.parametrize(
    "column, of, to, bounds, verdict",
    [
        ("decode", {"config": "a"}, {"config": "b"}, {"at_least": 2.4}, "holds"),
        ("decode", {"config": "a"}, {"config": "b"}, {"at_least": 2.7}, "inconclusive"),
        ("decode", {"config": "a"}, {"config": "b"}, {"at_least": 3.7}, "fails"),
        ("decode", {"config": "b"}, {"config": "a"}, {"at_most": 0.41}, "holds"),
        ("decode", {"config": "b"}, {"config": "a"}, {"at_most": 0.2}, "fails"),
        # the speed is of tokens: twice as many sequences in the same time
        ("decode", {"config": "a", "batch_size": 2}, {"config": "a"}, {"at_least": 1.6}, "holds"),
        ("prefill", {"config": "a", "seqlen": 16}, {"config": "a"}, {"at_least": 1.6}, "holds"),
        ("decode", {"config": "a", "seqlen": 16}, {"config": "a"}, {"at_most": 1.3}, "holds"),
        ("cache", {"config": "b"}, {"config": "a"}, {"at_least": 4, "at_most": 4}, "holds"),
        ("cache", {"config": "b"}, {"config": "a"}, {"at_most": 3.9}, "fails"),
        ("decode", {"config": "a", "seqlen": 32}, {"config": "a"}, {"at_least": 1}, "not run"),
        ("decode", {"config": "c"}, {"config": "a"}, {"at_least": 1}, "not run"),
    ],
)
def test_verdicts_of_ratios(column, of, to, bounds, verdict):
    default = {"batch_size": 1, "seqlen": 8}
    claim = RatioClaim("x", column, of={**default, **of}, to={**default, **to}, **bounds)
    assert judge(claim, ROWS)[1] == verdict


def test_claims_are_of_recipes_and_lengths_that_the_script_measures():
    for claim in load_config_file(CLAIMS)["claims"]:
        read = dataclass_from_dict(RatioClaim, claim)
        assert (read.at_least is None) != (read.at_most is None)
        for where in (read.of, read.to):
            assert where.keys() <= FAST.keys()
            assert (CONFIGS / "1B" / f"{where['config']}.yaml").exists()
            assert where["seqlen"] in [1024 * 2**i for i in range(8)]


def test_the_report_of_a_run(capsys, recipe, quick_ceilings):  # noqa: F811
    options = ["--seq-len", 4, 8, "--batch-size", 1, 2, "--max-prefill", 8]
    result, _ = run(capsys, "--config", recipe, *options)
    kinds = [(r["prefill"]["problem"], r["decode"]["problem"]) for r in result["rows"]]
    assert kinds == [("", ""), ("", ""), ("", ""), ("not measured", "")]
    result["rows"].append(row("tiny", 2, 16, None))
    saved, claims = recipe.with_name("r.json"), recipe.with_name("claims.yaml")
    saved.write_text(json.dumps(result))
    points = [{"config": "tiny", "batch_size": 1, "seqlen": n} for n in (8, 4)]
    same = {"claim": "Same cache.", "column": "cache", "of": points[0], "to": points[1]}
    claims.write_text(json.dumps({"question": "Why?", "claims": [{**same, "at_most": 1}]}))
    out = recipe.with_name("new") / "decode.md"
    main([str(saved), "--out", str(out), "--claims", str(claims)])
    text = out.read_text()
    assert "| Same cache. | - | cache: 1.000 | holds |" in text
    assert "| tiny | 2 |" in text and "| out of memory |" in text and "| not measured |" in text
    assert f"--config {recipe} --seq-len 4 8" in text
    data = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert data == result["rows"]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_cross_marks_each_point_without_memory(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plot_benchmark, "save_figure", lambda figure, out: drawn.append(figure))
    monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: None)
    result = {"rows": [*ROWS, row("c", 1, 8, None)], "device": "x", "dtype": "y"}
    plot_benchmark.draw([result], tmp_path / "a.png")
    for axes in drawn[0].axes[:2]:
        crosses = [
            line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())
        ]
        (cross,) = crosses  # c has no line, so no height
        last = next(line for line in axes.lines if line.get_label() == "a, batch 1")
        assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (32, last.get_ydata()[-1])
        assert cross.get_color() == last.get_color()
        assert "out of memory" in axes.get_title(loc="left")


def test_the_legend_has_configs_and_batch_sizes():
    rows = [{"config": c, "batch_size": n, "seqlen": 1024} for c in "ab" for n in (8, 1)]
    looks = plot_benchmark.line_looks([{"rows": rows}])
    entries = dict(plot_benchmark.legend_entries([{"rows": rows}], looks))
    assert list(entries) == ["a", "b", "batch 1", "batch 8"]
    for name, (config, n) in {"a, batch 1": ("a", 1), "b, batch 8": ("b", 8)}.items():
        assert looks[name]["color"] == entries[config]["color"]
        assert looks[name]["linestyle"] == entries[f"batch {n}"]["linestyle"]
    assert len(plot_benchmark.legend_entries([{"rows": rows[::2]}], looks)) == 2


def test_without_matplotlib_the_report_has_no_figure(monkeypatch, tmp_path):
    def refuse(*args):
        raise UserError("matplotlib is missing")

    monkeypatch.setattr("apps.LT2.scripts.benchmark_report.draw", refuse)
    facts = {"device": "x", "dtype": "y", "commit": None, "uncommitted_changes": False}
    plan = {"repeats": 1, "warmup": 1, "decode_tokens": 1, "compiled": True, "cuda_graph": True}
    result = {**facts, "torch": "2", "plan": plan, "refused": {"d": "why"}, "rows": ROWS}
    (tmp_path / "r.json").write_text(json.dumps(result))
    main([str(tmp_path / "r.json"), "--out", str(tmp_path / "decode.md")])
    text = (tmp_path / "decode.md").read_text()
    assert "decode.png" not in text and "Refused: d: why" in text


@pytest.mark.parametrize(
    "text, options, words",
    [
        ("Killed", [], "r.json"),
        ('{"rows": []}', [], "no point"),
        ('{"rows": [{"decode": 1}]}', ["--out", "x.png"], "--out"),
        ('{"rows": [{"decode": 1}]}', ["--claims", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes(tmp_path, text, options, words):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=words):
        main([str(tmp_path / "r.json"), "--out", str(tmp_path / "decode.md"), *options])
    assert not (tmp_path / "decode.md").exists()
