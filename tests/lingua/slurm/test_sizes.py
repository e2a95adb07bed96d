"""The sizes of a sweep's models: the table, the warning about differences, and match=."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lingua.errors import UserError
from lingua.slurm.script import StoolArgs
from lingua.slurm.sizes import Size, differences, format_sizes
from lingua.stool import launch_job

SIZE = Size("full", "2x1", parameters=1100, body=1000, flops=6000, overrides=())
RUNS = {"a": {"model.mixer": "a"}, "b": {"model.mixer": "b"}}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, []),
        ({"body": 1029, "flops": 5830, "parameters": 5000}, []),
        ({"body": 1031}, ["3% in parameters", "match=parameters"]),
        ({"body": 960}, ["4% in parameters", "960 in b, 1.00K in a"]),
        ({"flops": 12000}, ["100% in training FLOPs", "match=flops"]),
    ],
)
def test_differences_above_three_percent_are_reported(change, words):
    found = list(differences({"a": SIZE, "b": replace(SIZE, **change)}, RUNS, None))
    assert len(found) == bool(words) and all(word in found[0] for word in words)


def test_the_table_shows_differences_from_the_first_and_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = {"model.attention_pattern": "gdn*4,full", "model.gdn.expand_v": 1.0, "seed": 3}
    lines = format_sizes({"a": SIZE, "b": replace(SIZE, body=1500)}, {**RUNS, "b": long})
    lines = lines.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert "(+50%)" in lines[2] and lines[1].split() == [
        "mixer=a",
        "full",
        "1",
        "2x1",
        "1.10K",
        "1.00K",
        "6.00K",
    ]


def test_equal_models_share_a_row():
    runs = {f"a{seed}": {"model.mixer": "a", "seed": seed} for seed in (1, 2)}
    runs["b"] = {"model.mixer": "b", "seed": 1}
    lines = format_sizes({"a1": SIZE, "a2": SIZE, "b": replace(SIZE, body=7)}, runs).splitlines()
    assert len(lines) == 3 and lines[1].split()[:3] == ["mixer=a", "full", "2"]


DESCRIBE = """
import json, re, sys
from pathlib import Path

def describe(file):
    steps = int(re.search(r"^steps: (.*)", Path(file).read_text(), re.M)[1])
    if steps == 5:
        sys.exit(f"error: {Path(file).stem}: no size fits")
    matched = any(arg.startswith("match=") for arg in sys.argv) and steps == 3
    return {"layout": ["loop 1  FF", "F full (2)"], "n_layers": 2, "loop_count": 1,
            "parameters": {"total": 100, "embedding": 0}, "overrides": ["optim.lr=7"] * matched,
            "flops": {"training, per token": 100 if matched else 100 * steps}}

configs = [arg.removeprefix("config=") for arg in sys.argv if arg.startswith("config=")]
print(json.dumps({file: describe(file) for file in configs}))
"""


@pytest.fixture
def args_with_models(project, args) -> StoolArgs:
    script = project / f"{args.script.replace('.', '/')}.py"
    script.write_text(script.read_text().replace("    steps:", "    model: str = ''\n    steps:"))
    (script.parent / "describe.py").write_text(DESCRIBE)
    return args


def test_a_sweep_compares_its_models(args_with_models, project, monkeypatch, capfd):
    costs = []
    monkeypatch.setattr("lingua.stool.LocalSweep.run", lambda self: None)
    monkeypatch.setattr("lingua.stool.format_table", lambda folder: "")
    monkeypatch.setattr("lingua.slurm.sweep_plan.may_differ", lambda jobs: True)
    swept = replace(args_with_models, sweep={"steps": [2, 3]})
    launch_job(replace(swept, dry_run=True))
    table = capfd.readouterr().out.partition("would run these")[2].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["run", "steps=2", "steps=3"]
    assert "50% in training FLOPs" in table[-1] and not (project / "runs").exists()
    init = "lingua.stool.LocalSweep.__init__"
    monkeypatch.setattr(
        init, lambda self, jobs, at_once, given: costs.extend(given) or setattr(self, "runs", [])
    )
    launch_job(swept)
    assert "50% in training FLOPs" in capfd.readouterr().out and costs == [200, 300]


def test_match_changes_the_other_runs(args_with_models, project, monkeypatch, capfd):
    swept = replace(args_with_models, sweep={"steps": [1, 3]}, match="flops", by="ffn")
    launch_job(replace(swept, dry_run=True))
    out = capfd.readouterr().out
    assert "match=flops: steps=3: optim.lr=7" in out and "the models differ" not in out
    monkeypatch.setattr("lingua.stool.run_sweep_here", lambda *args: None)
    launch_job(swept)
    scripts = [project / "runs" / "a b" / f"steps={n}" / "submit.slurm" for n in (1, 3)]
    assert ["optim.lr=7" in Path(script).read_text() for script in scripts] == [False, True]
    with pytest.raises(UserError, match="by=ffn changes optim.lr"):
        launch_job(replace(swept, sweep={"steps": [1, 3], "optim.lr": [1.0]}, override=True))


def test_a_failed_description(args_with_models, capfd):
    swept = replace(args_with_models, sweep={"steps": [1, 5]}, dry_run=True)
    launch_job(swept)
    assert "sizes of the models are unknown: no size fits (in the run steps=5)" in (
        capfd.readouterr().out
    )
    with pytest.raises(UserError, match=r"no size fits \(in the run steps=5\)$"):
        launch_job(replace(swept, match="flops"))


def test_match_needs_models_and_a_sweep(args):
    with pytest.raises(UserError, match="match=flops"):
        launch_job(replace(args, sweep={"steps": [1, 2]}, match="flops"))
    with pytest.raises(UserError, match="match=flops needs a sweep"):
        StoolArgs(match="flops")
