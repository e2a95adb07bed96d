"""The table of runs: its rows, means, order, columns, widths and formats."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apps.LT2.pattern import PatternParser, format_layout
from lingua.errors import UserError
from lingua.run_columns import Column, Mean, option_column, plain, shorten_layout
from lingua.sweep import main

MODELS = list(itertools.product(["gdn", "kda"], [1, 10], [0, 1]))
LAYOUT = "        0\nloop 0  ggggF\ng gdn (4)  F full (1)"


def write_run(folder: Path, options: dict[str, Any], losses: list, **facts: Any) -> Path:
    """Write a run with a record and a validation every 10 steps."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(options))
    records: list[dict[str, Any]] = []
    for i, loss in enumerate(losses, start=1):
        at = {"optim/total_tokens": 1000 * i, "optim/total_flops": 5e15 * i, "speed/mfu": i / 8}
        speed = {"speed/tokens_per_s": 2000.0 + i}
        records.append({"global_step": 10 * i, "loss/out": 9.0} | at | speed | facts)
        records.append({"global_step": 10 * i, "loss/val": loss})
        facts = {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture(scope="module")
def tune(tmp_path_factory) -> Path:
    """A sweep of 8 runs. The last loss is 8 - T / 10, plus 1 for kda, plus or minus 0.5 by seed."""
    folder, swept = tmp_path_factory.mktemp("runs") / "tune", {}
    for mixer, loops, seed in MODELS:
        label = f"mixer={mixer},loop_count={loops},seed={seed}"
        swept[label] = {"model.mixer": mixer, "model.loop_count": loops, "seed": seed}
        options = {"model": {"mixer": mixer, "loop_count": loops}, "seed": seed, "steps": 30}
        options["profiling"] = {"run": False}
        last = 8.0 - loops / 10 + (mixer == "kda") + seed - 0.5
        facts = {"model/parameters": 1_234_567, "model/layout": LAYOUT.replace("gdn", mixer)}
        write_run(folder / label, options, [9.5, last - 0.1, last], **facts)
    (folder / "sweep.json").write_text(json.dumps(swept))
    return folder


@pytest.fixture
def rows(capsys):
    """Return the rows that the command prints as JSON."""

    def call(*argv: Any) -> list[dict[str, Any]]:
        main([*map(str, argv), "format=json"])
        return json.loads(capsys.readouterr().out)

    return call


def test_a_row_has_options_sizes_and_results(tune, rows):
    found = rows(tune)
    assert [(r["model.mixer"], r["model.loop_count"], r["seed"]) for r in found] == MODELS
    first = found[0]
    del first["model.mixer"], first["model.loop_count"], first["seed"]
    assert first.pop("val") == pytest.approx(7.4) and first.pop("best") == pytest.approx(7.3)
    assert first == {
        "run": "mixer=gdn,loop_count=1,seed=0",
        "status": "finished",
        "layout": "gdn*4,full",
        "parameters": 1234567,
        "flops": 1.5e16,
        "tokens": 3000,
        "step": 30,
        "loss": 9.0,
        "tokens/s": 2003.0,
    }


def test_a_mean_has_a_standard_deviation_and_n(tune, rows):
    found = rows(tune, "mean=seed")
    names = [(r["model.mixer"], r["model.loop_count"]) for r in found]
    assert names == [("gdn", 1), ("gdn", 10), ("kda", 1), ("kda", 10)]
    assert [r["val"] for r in found] == pytest.approx([7.9, 7.0, 8.9, 8.0])
    for row in found:
        assert row["val std"] == pytest.approx(0.5**0.5) and (row["n"], row["val n"]) == (2, 2)
        assert "seed" not in row and "run" not in row and row["status"] == "finished"
    (all_runs,) = rows(tune, "mean=mixer,model.loop_count,seed")
    assert all_runs["n"] == 8 and all_runs["val"] == pytest.approx(7.95)
    assert all_runs["layout"] == "varies" and all_runs["flops"] == 1.5e16
    by_mixer = rows(tune, "mean=loop_count,seed", "columns=mixer,val")
    assert [r["val"] for r in by_mixer] == pytest.approx([7.45, 8.45])


def test_runs_without_a_value_lower_n(tmp_path, rows, caplog, capsys):
    for seed, losses in enumerate([[9.0, 7.0], [9.0, 5.0], [None, None], []]):
        write_run(tmp_path / "runs" / f"{seed}", {"seed": seed, "steps": 20}, losses)
    (row,) = rows(tmp_path / "runs", "mean=seed")
    assert (row["val"], row["val std"], row["val n"], row["n"]) == (6.0, 2**0.5, 2, 4)
    assert row["status"] == "3/4 done" and "NaN or infinite" in caplog.text
    write_run(tmp_path / "runs" / "4", {"seed": 4, "steps": 20}, [8.0])
    main([str(tmp_path / "runs"), "mean=seed", "columns=val"])
    assert "6.7±1.5 (n=3)" in capsys.readouterr().out and "steps, 10 to 20" in caplog.text


@pytest.mark.parametrize(
    "value, std, n, text",
    [
        (7.123456, 0.0123, 2, "7.123±0.012"),
        (7.123456, 0.9, 2, "7.12±0.90"),
        (7.123456, 1e-7, 2, "7.1235±0.0000"),
        (3e-4, 1.23e-5, 2, "0.0003±1.2e-05"),
        (2000.0, 123.0, 2, "2000±123"),
        (7.0, None, 1, "7.0000 (n=1)"),
    ],
)
def test_digits_of_a_mean_follow_its_standard_deviation(value, std, n, text):
    column = Column("x", lambda run: None, plain, is_measured=True)
    assert column.text(Mean(value, std, n, 2)) == text


def test_the_last_value_counts_even_if_it_is_nan(tmp_path, rows, capsys):
    write_run(tmp_path / "a", {"lr": 1, "steps": 30}, [7.0, 6.0, None])
    write_run(tmp_path / "b", {"lr": 2, "steps": 30}, [7.0, 6.5, 6.8])
    assert [row["run"] for row in rows(tmp_path, "sort=-val")] == ["b", "a"]
    a, b = rows(tmp_path)
    assert (a["val"], a["best"], b["val"], b["best"]) == (None, 6.0, 6.8, 6.5)
    main([str(tmp_path), "columns=val", "format=csv"])
    assert capsys.readouterr().out == "val\nnan\n6.8\n"


@pytest.mark.parametrize(
    "sort, order",
    [
        ("val", ["10", "9", "b", "none"]),
        ("-val", ["b", "9", "10", "none"]),
        ("lr", ["none", "9", "10", "b"]),  # by value, not by letters
        ("-optim.lr,run", ["b", "10", "9", "none"]),
        ("steps,-val", ["b", "9", "10", "none"]),  # an option that does not differ
        ("mfu", ["b", "9", "10", "none"]),  # any metric
        ("-mfu", ["9", "10", "b", "none"]),
    ],
)
def test_rows_are_sorted_by_any_column(tmp_path, rows, sort, order):
    options = {"10": (10, [7.0, 5.0]), "9": (9, [7.0, 6.0]), "b": (11, [8.0]), "none": (1e-3, [])}
    for name, (lr, losses) in options.items():
        write_run(tmp_path / name, {"optim": {"lr": lr}, "steps": 20}, losses)
    assert [row["run"] for row in rows(tmp_path, f"sort={sort}")] == order


def test_columns_are_any_options_and_metrics(tune, rows, capsys):
    found = rows(tune, "columns=val,mixer,steps,mfu,params", "sort=-val,seed")
    assert list(found[0]) == ["val", "model.mixer", "steps", "speed/mfu", "parameters"]
    assert list(found[0].values()) == [pytest.approx(9.4), "kda", 30, 0.375, 1234567]
    main([str(tune), "columns=steps,mfu", "mean=seed"])
    assert capsys.readouterr().out.splitlines()[3].split() == ["30", "0.3750±0"]
    main([str(tune), "columns=run,val", "format=markdown", "sort=run"])
    assert capsys.readouterr().out.splitlines()[2].startswith("| mixer=gdn,loop_count=1,seed=0 |")
    (row,) = rows(tune, "columns=loop_count,steps", "mean=mixer,loop_count,seed")
    assert row == {"model.loop_count": "varies", "steps": 30}


@pytest.mark.parametrize("width, n_left_out", [(80, 1), (100, 0), (120, 0)])
@pytest.mark.parametrize("mean", ["", "seed"])
def test_the_table_fits_the_terminal(tune, capsys, monkeypatch, width, n_left_out, mean):
    monkeypatch.setenv("COLUMNS", str(width))
    main([str(tune), f"mean={mean}"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    header = text.partition("─")[0].split()
    for name in ("mixer", "count", "status", "layout", "params", "FLOPs", "tokens", "val", "best"):
        assert name in header
    assert text.count("not shown") == n_left_out and text.count("gdn*4,f") == (4 if not mean else 2)
    assert "8 runs: 8 finished" in text


def test_many_options_and_long_values_fit_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for i in range(3):
        pattern = ",".join(["gdn", "full"] * 20 + ["kda"] * i)
        options = {f"model.number_{j}": i for j in range(12)} | {"model.attention_pattern": pattern}
        write_run(tmp_path / f"{i}-{'x' * 60}", options, [1.0])
    main([str(tmp_path)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    main([str(tmp_path), "columns=attention_pattern,val"])
    folded = "".join(capsys.readouterr().out.split())
    assert "full,kda,kda" in folded  # values of options are not cut


def test_unrelated_runs_show_the_options_that_matter(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for i in range(3):
        options = {f"data.number_{j}": i for j in range(20)} | {f"model.size_{j}": i for j in "ab"}
        options |= {"optim.lr": i + 1, "model.loop_count": i, "model.mixer": "gk"[i % 2]}
        facts = {"model/parameters": 1_234_567, "model/layout": LAYOUT}
        write_run(tmp_path / f"{i}", options, [1.0], **facts)
    main([str(tmp_path)])
    header, _, rest = capsys.readouterr().out.partition("─")
    for name in ("mixer", "count", "lr", "size_a", "layout", "params", "tokens", "val"):
        assert name in header.split()
    assert "number_19" not in header + rest
    assert re.search(r"not shown.* and \d+ more \(see columns=", " ".join(rest.split()))


def test_options_that_a_sweep_leaves_out_are_missing(tmp_path, rows):
    swept = {"a": {"mixer": "gdn", "gdn.expand_v": 1}, "b": {"mixer": "full"}}
    for name in swept:
        options = {"mixer": swept[name]["mixer"], "gdn": {"expand_v": 1}, "steps": 10}
        write_run(tmp_path / name, options, [7.0])
    (tmp_path / "sweep.json").write_text(json.dumps(swept))
    found = rows(tmp_path, "columns=run,expand_v,steps", "sort=run")
    assert [list(row.values()) for row in found] == [["a", 1, 10], ["b", None, 10]]


@pytest.mark.parametrize(
    "option, header",
    [
        ("seed", "seed"),
        ("optim.lr", "lr"),
        ("model.gdn.head_dim", "gdn.head_dim"),  # the other mixers of a sweep don't use it
    ],
)
def test_a_header_names_the_section_of_an_option(option, header):
    assert option_column(option, [option, "steps"]).header == header


def test_options_that_follow_from_the_swept_ones_make_room_for_results(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "50")
    swept = {mixer: {"mixer": mixer} for mixer in ("gdn", "full")}
    for mixer, multiplier in (("gdn", 1.1), ("full", 0.9)):  # as match=parameters changes them
        options = {"mixer": mixer, "ffn_dim_multiplier": multiplier}
        write_run(tmp_path / mixer, options, [7.0], **{"model/parameters": 1_234_567})
    (tmp_path / "sweep.json").write_text(json.dumps(swept))
    main([str(tmp_path)])
    header, _, rest = capsys.readouterr().out.partition("─")
    assert "params" in header and "val" in header and "multiplier" not in header
    assert "ffn_dim_multiplier" in rest.partition("not shown")[2]


def test_means_of_different_sizes_are_marked(tmp_path, capsys):
    for seed, n in enumerate((1_000_000, 2_000_000)):
        options = {"seed": seed, "steps": 10}
        write_run(tmp_path / f"{seed}", options, [7.0], **{"model/parameters": n})
    main([str(tmp_path), "mean=seed", "columns=params,tokens"])
    assert capsys.readouterr().out.splitlines()[2].split() == ["~1.50M", "1.00K"]


def test_formats_have_the_same_rows(tune, rows, capsys):
    want = rows(tune, "mean=seed")
    main([str(tune), "mean=seed", "format=csv"])
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert found == [{key: str(value) for key, value in row.items()} for row in want]
    main([str(tune), "mean=seed", "format=markdown"])
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and header.count("|") == rule.count("|") == lines[0].count("|")
    assert "7.90±0.71" in lines[0] and "1.23M" in lines[0] and "1.5e16" in lines[0]


def test_older_and_half_written_runs_have_rows(tmp_path, capsys, caplog):
    whole = {"steps": 9, "seed": 1, "optim": {"lr": 0.1, "clip": 1.0}}
    write_run(tmp_path / "active", whole, [])
    (tmp_path / "active" / "metrics.jsonl").write_text(
        '{"global_step": 3, "loss/out": 2.5}\n{"global_step": 4, "lo'
    )
    write_run(tmp_path / "other", whole | {"seed": 2}, [])
    for name, text in {"cut": '{"steps": 9, "optim": {"l', "empty": "", "stray": None}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").write_text("")
        if text is not None:
            (tmp_path / name / "config.yaml").write_text(text)
    (tmp_path / "launched").mkdir()  # by stool, but not started
    (tmp_path / "launched" / "base_config.yaml").write_text(json.dumps({"optim": {"lr": 0.3}}))
    main([str(tmp_path)])
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "lr", "seed", "status", "step", "loss"]
    assert [line.split() for line in lines[:-1]] == [
        ["active", "0.1", "1", "stopped", "3", "2.5000"],
        ["cut", "-", "-", "waiting", "-", "-"],
        ["empty", "-", "-", "waiting", "-", "-"],
        ["launched", "0.3", "-", "waiting", "-", "-"],
        ["other", "0.1", "2", "stopped", "-", "-"],
    ]
    assert "cut: options are not readable" in caplog.text and "not YAML" in caplog.text


def test_runs_are_folders_sweeps_or_globs(tune, tmp_path, rows, monkeypatch):
    write_run(tmp_path / "runs" / "one", {"seed": 5, "steps": 10}, [7.0])
    (tmp_path / "runs" / "tune").symlink_to(tune)
    monkeypatch.chdir(tmp_path)
    assert {row["run"] for row in rows("runs")} == {"one"} | {
        f"tune/{p.name}" for p in tune.glob("m*")
    }
    assert len(rows("runs/one", "runs", "dump_dir=runs/tune")) == 9  # each run once
    assert len(rows("runs/tune/mixer=kda,*")) == 4 == len(rows(*tune.glob("mixer=kda*")))
    monkeypatch.chdir(tune)  # names that look like options
    assert len(rows(*[path.name for path in tune.iterdir()])) == 8


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "no runs given"),
        (["{tmp}/absent"], "absent does not exist"),
        (["{tmp}/none*"], "none.* does not exist"),
        (["{tmp}/empty"], "empty: no run in it"),
        (["{tmp}/file"], "file: no run in it"),
        (["dump_dir={tmp}/empty"], "empty: no run in it"),
        (["{tune}", "columns=vall"], "columns=vall: .*mixer.*val"),
        (["{tune}", "sort=-perplexity"], "sort=perplexity: .*val"),
        (["{tune}", "columns=model.seed"], "columns=model.seed"),
        (["{tune}", "columns=run", "mean=seed"], "columns=run: .*mean="),
        (["{tune}", "mean=sed"], "mean=sed: .*seed"),
        (["{tune}", "format=yaml"], "format=yaml must be one of table, csv"),
        (["{tune}", "means=seed"], "means"),
        (["{tmp}/run", "sort=val"], "sort=val: no run has this column; use .*loss"),
    ],
)
def test_mistakes_are_one_line(tune, tmp_path, argv, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "run", {"steps": 9}, [])
    (tmp_path / "run" / "metrics.jsonl").write_text('{"global_step": 3, "loss/out": 2.5}\n')
    with pytest.raises(UserError, match=words) as raised:
        main([arg.format(tmp=tmp_path, tune=tune) for arg in argv])
    assert len(str(raised.value).splitlines()) == 1


def test_the_command_needs_no_torch(tune):
    code = "import sys, lingua.sweep as s; s.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tune.parent), "mean=seed"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    "pattern, n_layers, loops, want",
    [
        (None, 5, 2, "gdn"),
        ("4:1", 5, 2, "gdn*4,full"),
        ("4:1", 21, 2, "gdn*4,full"),
        ("bookend:1", 21, 2, "full,gdn*19,full"),
        ("128->256->full", 6, 3, "window=128->window=256->full"),
        ("4:1->gdn->gdn", 5, 3, "gdn*4,full->gdn"),
        ("gdn*2,128,full", 120, 2, "gdn*2,window=128,full"),  # in bands of the recorded table
    ],
)
def test_a_layout_is_shortened_to_its_cycle(pattern, n_layers, loops, want):
    parser = PatternParser(n_layers, loops, "gdn", "full", 256, ("gdn", "full", "window"))
    plan = parser.parse(pattern)
    assert shorten_layout(format_layout(plan.loops, plan.random_loops)) == want


def test_a_random_layout_is_marked():
    plan = PatternParser(4, 2, "window", "full", 256, ("full", "window")).parse("random:3:1")
    text = shorten_layout(format_layout(plan.draw(None), plan.random_loops))
    assert text.startswith("random ") and "window=256" in text
