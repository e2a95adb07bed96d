"""Studies: arms and seeds to runs, time limits, results, verdicts, and mistakes."""

from __future__ import annotations

import json
import math
import multiprocessing.context
import multiprocessing.process
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from apps.LT2.flops import count_parameters, train_flops_per_token
from apps.LT2.scripts import study as command
from apps.LT2.scripts import study_report as report
from apps.LT2.scripts import study_runs
from apps.LT2.scripts.study import main, plan_cells
from apps.LT2.scripts.study_spec import DEFAULTS, STUDIES, read_study
from lingua.errors import UserError
from lingua.runs import Run, read_runs
from lingua.slurm import local_sweep
from lingua.slurm.run_list import RunOptions
from tests.lingua.slurm.test_local_sweep import jobs_in, write_metrics
from tests.LT2.tiny_run import write_corpus

OPEN = "inconclusive: a run is not finished"
NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml") if path.name != DEFAULTS)
# Arms that a test runs; the others differ in the mixer or in T, which other tests cover.
ARMS = {
    "mixers": ["hybrid"],
    "permutation": ["single"],
    "permutation_mixers": ["gdn_neg"],
    "sink": ["plain"],
    "stability": ["mamba2"],
}
ON_TASKS = ["permutation", "permutation_mixers"]  # they need no text


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Options for a corpus like that of setup/prepare_local_data.py."""
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    return [f"data.root_dir={root}", "data.sources={text: 1.0}"]


def run_study(quick_python, name: str, folder: Path, *options: str) -> str:
    command = ["-m", "apps.LT2.scripts.study", name, "size=tiny", f"dump_dir={folder}", *options]
    done = quick_python.run(*command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- whole studies


def test_loops_from_the_command_to_the_report(quick_python, data, tmp_path):
    folder = tmp_path / "study"
    printed = run_study(quick_python, "loops", folder, "arms=[fixed]", "jobs=2", *data)
    assert "2 runs at a time on the CPU" in printed
    before = (folder / "arm=fixed,seed=1" / "metrics.jsonl").read_bytes()
    printed = run_study(quick_python, "loops", folder, "arms=[fixed,poisson]", "seeds=1", *data)
    assert "1 of 2 runs are done already" in printed
    assert re.search(r"val \d\.\d+ nats per token", printed)
    assert "T=1, T=2, T=4, T=8: loss in bits per byte" in printed
    assert "Its numbers say nothing about the claims" in printed
    assert (folder / "arm=fixed,seed=1" / "metrics.jsonl").read_bytes() == before

    results = [json.loads(line) for line in (folder / "loops.jsonl").read_text().splitlines()]
    found = sorted((r["arm"], r["seed"]) for r in results)
    assert found == [("fixed", 1), ("fixed", 2), ("poisson", 1)]
    runs = {run.path.name: run for run in read_runs([folder])}
    for result in results:
        run = runs[f"arm={result['arm']},seed={result['seed']}"]
        losses = [[n, result[f"T={n}"]] for n in (1, 2, 4, 8)]
        assert losses == result["loss/val_bpb by loops"]
        assert losses == [[n, run.metrics[f"loss/val_bpb/{n}"][run.step]] for n in (1, 2, 4, 8)]
        assert run.options.current["model.loop_count"] == (4 if result["arm"] == "fixed" else 8)
    text = (folder / "loops.md").read_text()
    values = [r["T=4"] for r in results if r["arm"] == "fixed"]
    assert f"{statistics.fmean(values):.4f}±{statistics.stdev(values):.4f}" in text
    for said in (
        "seeds=2",
        "bits per byte",
        "Commit",
        "Devices: 1 x CPU",
        "Versions: Python",
        "Hours",
        "arm=uniform",
        "fixed: `model.loop_count=4`",
        "poisson: `model.loop_count=8 model.loop_sample=poisson:4`",
    ):
        assert said in text
    assert (folder / "loops.png").stat().st_size > 10_000
    assert json.loads((folder / "study.json").read_text())["seconds"] > 0


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"loops"}))
def test_every_study_runs(quick_python, data, tmp_path, name):
    options = [f"arms={ARMS[name]}".replace("'", "")] if name in ARMS else []
    options += [] if name in ON_TASKS else data
    printed = run_study(quick_python, name, tmp_path / "study", "seeds=1", *options)
    text = (tmp_path / "study" / f"{name}.md").read_text()
    study = read_study(name, "tiny")
    if name in ON_TASKS:
        assert "nats per token" not in printed + text and "nats per answer" in printed
    assert all(header in text for header in study.columns if "4" not in header)
    assert all(claim["claim"] in text for claim in study.claims)
    assert (tmp_path / "study" / f"{name}.png").exists()


# ---- declarations


@pytest.mark.parametrize("name", NAMES)
def test_claims_and_columns_name_what_the_study_has(name):
    study = read_study(name, "small")
    metrics = {metric.rpartition(" ")[2] for metric in study.columns.values()}
    for claim in study.claims:
        assert claim["column"] in study.columns
        for side in (claim["lower"], claim["than"]):
            assert side["arm"] in study.arms
            assert all(side[option] in values for option, values in study.over.items())
    for drawn in study.plots:
        y = drawn["y"].replace("depth/", "loops/")  # by layer: the columns have the means of loops
        assert y in metrics or any(m.startswith(f"{y}/") for m in metrics)


def test_equal_flops_change_the_steps(data):
    study = read_study("loops", "tiny")
    given = command.split_options(command.StudyArgs, ["steps=100", *data], "", None)[1]
    study = command.with_options(study, given)
    cells = {cell.arm: cell for cell in plan_cells(study, list(study.arms))}
    assert cells["fixed"].options["steps"] == 100
    for cell in cells.values():
        args, model = command.build(study, cell.options)
        steps = cell.options["steps"]
        flops = steps * 2 * 128 * train_flops_per_token(model, 128)
        assert cell.flops == pytest.approx(flops) == pytest.approx(cells["fixed"].flops, rel=0.01)
    assert cells["scheduled"].options["steps"] > 120 > cells["uniform"].options["steps"]


def test_small_mixers_have_equal_parameters_and_flops(data):
    """The arm whose mixer has the most parameters, and T at both ends."""
    study = read_study("mixers", "small")
    given = command.split_options(command.StudyArgs, data, "", None)[1]
    study = replace(command.with_options(study, given), over={"model.loop_count": [1, 4]})
    cells = plan_cells(study, ["full", "mamba2"])
    models = [command.build(study, cell.options)[1] for cell in cells]
    first = count_parameters(models[0]).body
    assert first > 10_000_000
    for cell, model in zip(cells, models, strict=True):
        assert count_parameters(model).body == pytest.approx(first, rel=0.005)
        tokens = cell.options["steps"] * 16 * 512
        flops = tokens * train_flops_per_token(model, 512)
        assert flops == pytest.approx(cells[0].flops, rel=0.005)
    assert cells[0].options["steps"] > 3.9 * cells[1].options["steps"]


def test_a_study_of_your_own(tmp_path, capsys, data):
    own = {
        "question": "Does it depend on the width?",
        "config": str(STUDIES.parent / "600M" / "debug.yaml"),
        "arms": {"narrow": {"model.dim": 64}, "wide": {"model.dim": 80}},
        "match": "flops",
        "by": "ffn",
        "columns": {"bpb": "loss/val_bpb"},
        "seeds": 2,
        "sizes": {"mine": {"seeds": 5, "options": {"data.seq_len": 64, "model.n_layers": 5}}},
    }
    (tmp_path / "width.yaml").write_text(yaml.safe_dump(own))
    options = ["model.n_heads=2", "model.gdn.head_dim=16", "data.tokenizer.name=bytes", *data]
    main([str(tmp_path / "width.yaml"), "size=mine", "dry_run=true", *options])
    printed = capsys.readouterr().out
    assert "width, size=mine, seeds=5" in printed and "in all 10 runs" in printed
    first, second = [float(line.split()[-2]) for line in printed.splitlines()[1:3]]
    assert first == pytest.approx(second, rel=0.05)
    # The defaults' sizes, of a width of 256 and more, fit the defaults' recipe alone.
    assert not read_study(str(tmp_path / "width.yaml"), "small").options
    with pytest.raises(UserError, match="size=tiny must be one of small, mine"):
        read_study(str(tmp_path / "width.yaml"), "tiny")


# ---- results


def run_with(values: dict[str, Any], **options: Any) -> Run:
    metrics = {key: v if isinstance(v, dict) else {9: v} for key, v in values.items()}
    return Run("r", Path("r"), RunOptions(options, {}, True), metrics, [], None, [])


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        ([1.0, 1.1], [1.2, 1.3], "holds"),
        ([1.2, 1.3], [1.0, 1.1], "fails"),
        ([1.0, 1.25], [1.2, 1.3], "inconclusive"),
        ([1.0, 1.2], [1.2, 1.3], "inconclusive"),
        ([1.0], [1.2, 1.3], "inconclusive: one seed"),
        ([], [1.2, 1.3], "not run"),
        ([1.0, 1.1], [None, 1.3], "holds"),  # a diverged run is worse than any other
        ([1.0, None], [1.2, 1.3], "inconclusive"),
        ([0, 0], [0, 0], "inconclusive"),
    ],
)
def test_verdicts(low, high, verdict):
    study = replace(read_study("loops", "small"), columns={"bpb": "loss/val_bpb"})
    claim = report.Claim("x", "bpb", lower={"arm": "a"}, than={"arm": "b", "T": 4})
    runs = [run_with({"loss/val_bpb": v}, arm="a", T=4) for v in low]
    runs += [run_with({"loss/val_bpb": v}, arm="b", T=4) for v in high]
    runs += [run_with({"loss/val_bpb": 0.0}, arm="b", T=2)]
    ours, found = report.judge(study, claim, runs)
    assert found == verdict and re.fullmatch(r"a [^,]+, b T=4 [^,]+", ours)
    tiny = replace(study, size="tiny")
    assert report.judge(tiny, claim, runs)[1] not in ("holds", "fails")


def test_a_failed_run_leaves_its_claims_open():
    """It may have diverged: the arm must not win by its other seeds."""
    study = replace(read_study("loops", "small"), columns={"bpb": "loss/val_bpb"})
    claim = report.Claim("x", "bpb", lower={"arm": "a"}, than={"arm": "b"})
    runs = [run_with({"loss/val_bpb": v}, arm="a") for v in (1.0, 1.1)]
    runs += [run_with({"loss/val_bpb": v}, arm="b") for v in (1.2, 1.3)]
    for arm, verdict in {"a": OPEN, "c": "holds"}.items():
        assert report.judge(study, claim, runs, [run_with({}, arm=arm)])[1] == verdict
    mixed = [*runs, run_with({"loss/val_bpb": 1.25}, arm="a")]  # above one of b, below the other
    for arm in ("a", "b"):
        assert report.judge(study, claim, mixed, [run_with({}, arm=arm)])[1] == "inconclusive"


# n_max of each seed of `lower` and `than`, of at most 64
@pytest.mark.parametrize(
    "low, high, verdict",
    [
        ("0 8", "64 >=16 >=32", "holds"),
        ("0 8", "64 >=8 >=32", OPEN),
        ("0 8 >=8", "64 >=32", OPEN),
        (">=32 >=32", "8 16", "fails"),
        (">=32 >=32", "8 16 >=16", OPEN),
        ("32 32 >=32", "32 >=32 >=32", "inconclusive"),
        ("32 32 >=16", "32 32", "inconclusive"),
        ("64 64 >=16", "32 32", OPEN),  # it can't hold, but may fail
        ("16 >=16", "16 64", "inconclusive"),
        (">=8 >=8", "32 64", OPEN),
        (">=16 >=16", "32 >=32", OPEN),
        ("8 64", ">=16 >=8", "inconclusive"),  # 64 is the longest
        ("8 8", "64 >=8", OPEN),
        (">=8 >=8", "64 64", OPEN),
    ],
)
def test_runs_that_can_only_rise_decide_a_claim_early(low, high, verdict):
    study = replace(read_study("loops", "small"), columns={"n_max": "n_max"})
    claim = report.Claim("x", "n_max", lower={"arm": "a"}, than={"arm": "b"})
    runs: dict[bool, list[Run]] = {True: [], False: []}  # by whether they can rise
    for arm, values in {"a": low, "b": high}.items():
        for text in values.split():
            run = run_with({"n_max": float(text.removeprefix(">="))}, arm=arm)
            runs[text.startswith(">=")].append(run)
    ours, found = report.judge(study, claim, runs[False], rising=runs[True], most=64)
    assert (ours, found) == (f"a {low}, b {high}", verdict)


def test_runs_without_a_result_are_named_once():
    study = replace(read_study("loops", "small"), arms=dict.fromkeys("abc", {}), sizes=["small"])
    swept = {
        f"arm={arm},seed={seed}": {"arm": arm, "seed": seed} for arm in "ab" for seed in (1, 2)
    }
    failed = run_with({})
    failed.path, failed.error = Path("x/arm=a,seed=2"), "CUDA out of memory"
    found = report.find_not_run(
        study, swept, ["arm=a,seed=2", "arm=b,seed=1", "arm=b,seed=2"], [failed]
    )
    assert found == ["arm=b (2 runs)", "arm=c", "failed: arm=a,seed=2: CUDA out of memory"]


def test_a_column_that_no_run_has_is_a_warning(caplog):
    study = replace(read_study("loops", "small"), columns={"bpb": "loss/val_bpb", "x": "loss/vla"})
    report.warn_missing(study, [run_with({"loss/val_bpb": 1.0}), run_with({})])
    assert [record.args for record in caplog.records] == [("x", "loss/vla")]


def test_a_report_leaves_out_runs_that_the_study_no_longer_has():
    over = {"model.loop_count": [2, 4]}
    study = replace(read_study("loops", "small"), arms={"a": {}}, over=over)
    swept = {"arm": "a", "model.loop_count": 4, "seed": 1}
    assert report.has_run(study, swept)
    assert not report.has_run(study, {**swept, "arm": "b"})
    assert not report.has_run(study, {**swept, "model.loop_count": 8})
    assert not report.has_run(replace(study, over={}), swept)


def test_statistics_of_gradient_norms():
    norms = [99.0] * 3 + [1.0] * 60 + [4.5, 1.0, 3.5, 8.0, math.inf]
    metrics = {"norm": {i: v if math.isfinite(v) else None for i, v in enumerate(norms)}}
    run = run_with({**metrics, "global_step": {67: 67}})
    report.add_statistics(run, ["spikes norm", "max norm", "median norm", "norm"])
    assert run.metrics["spikes norm"] == {67: 3}
    assert run.metrics["max norm"] == {67: None}  # infinite
    assert run.metrics["median norm"] == {67: 1.0}


@pytest.mark.parametrize("above, ratio", [(3.0, 1.5), (None, None)])
def test_the_ratio_of_two_metrics(above, ratio):
    run = run_with({"rms/3": {4: 9.0, 9: above}, "rms/0": {4: 1.0, 9: 2.0}, "global_step": 9})
    report.add_statistics(run, ["rms/3 / rms/0", "rms/3 / rms/7"])
    assert run.metrics["rms/3 / rms/0"] == {9: ratio}
    assert "rms/3 / rms/7" not in run.metrics


# ---- time, mistakes


class Process:
    """A run that ends when it is stopped, or at the `n`-th look."""

    stopped: list[str] = []
    output = SimpleNamespace(warnings=lambda: [])

    def __init__(self, job: Any, gpus: str | None):
        self.name, self.gpus, self.is_stopped = job.dump_dir.name, gpus, False

    def done(self) -> bool:
        return self.is_stopped or self.name == "run=0"

    def failure(self) -> None:
        return None

    def terminate(self) -> None:
        self.is_stopped = self.name != "run=2"  # which is in a long step
        self.stopped.append(self.name)

    def kill(self) -> None:
        self.is_stopped = True
        self.stopped.append(f"killed {self.name}")


def test_a_study_stops_in_time_and_shares_gpus(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study_runs, "ForkedProcess", Process)
    monkeypatch.setattr(local_sweep, "POLL_SECONDS", 0.01)
    jobs = jobs_in(tmp_path, 5, steps=10)
    write_metrics(jobs[0], {"global_step": 10})
    for job in jobs[1:4]:
        write_metrics(job, {"global_step": 4})
    record, file = {"seconds": 5.0}, tmp_path / "study.json"
    now = time.monotonic()
    own = {"gpus": ["3", "5"], "record": record, "file": file}
    own |= {"stop_at": now + 0.2, "kill_at": now + 0.3}
    sweep = study_runs.StudySweep(jobs, 3, [1.0] * 5, **own)
    assert sweep.slots == ["3", "5", "3"]
    sweep.run()  # raises nothing
    assert Process.stopped == ["run=1", "run=2", "run=3", "killed run=2"]
    outcomes = [run.outcome for run in sweep.runs]
    assert outcomes == ["done", "stopped", "stopped", "stopped", ""]
    assert "4 runs are not finished; the same command" in capsys.readouterr().out
    seconds = json.loads(file.read_text())["seconds"]
    assert 5.6 <= seconds == record["seconds"] < 15  # two GPUs for 0.3 s


@pytest.mark.parametrize("limit, ran", [(60.0, ["run=0", "run=1", "run=2"]), (-1.0, ["run=0"])])
def test_a_run_may_follow_one_that_is_done(monkeypatch, tmp_path, limit, ran):
    monkeypatch.setattr(study_runs, "ForkedProcess", Process)
    monkeypatch.setattr(Process, "done", lambda self: True)
    monkeypatch.setattr(local_sweep, "POLL_SECONDS", 0.01)
    jobs = jobs_in(tmp_path, 3, steps=10)
    for job in jobs:
        write_metrics(job, {"global_step": 10})
    followers = {"run=0": (jobs[2], 1.0)}
    own = {"gpus": ["3"], "record": {"seconds": 0.0}, "file": tmp_path / "study.json"}
    own |= dict.fromkeys(("stop_at", "kill_at"), time.monotonic() + limit)
    sweep = study_runs.StudySweep(jobs[:2], 1, [1.0] * 2, **own, then=followers.get)
    sweep.run()
    assert [run.label for run in sweep.runs if run.outcome == "done"] == ran


@pytest.mark.parametrize("gpus", [None, "3"])
def test_only_a_study_on_gpus_forks_a_server(monkeypatch, tmp_path, gpus):
    """A forked run would start its own server for data workers, which would import for seconds."""
    preloaded = []
    context = multiprocessing.context.BaseContext
    monkeypatch.setattr(context, "set_forkserver_preload", lambda _, names: preloaded.extend(names))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: None)
    process = study_runs.ForkedProcess(jobs_in(tmp_path, 1, steps=1)[0], gpus)
    is_server = isinstance(process._process, multiprocessing.context.ForkServerProcess)
    assert is_server == (gpus is not None) == (study_runs.SCRIPT in preloaded)


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "loops, mixers"),
        (["loop"], r"loop: did you mean loops\?"),
        (["x"], "x: use loops, mixers, .*, or a YAML file"),
        (["gone.yaml"], "gone.yaml: no such file; use loops"),
        (["curriculum"], "curriculum is not a study; use lt2 curriculum"),
        (["loops", "mixers"], "mixers"),
        (["loops", "size=huge"], "size=huge must be one of tiny, small, full"),
        (["loops", "arms=[fixed,foo]"], "no arm foo; use fixed, poisson"),
        (["loops", "arms=[]"], r"arms=\[\] names no arm; use fixed, poisson"),
        (["loops", "jobs=0"], "jobs=0"),
        (["loops", "minutes=-1"], "minutes=-1"),
        (["loops", "model.loop_count=2"], "model.loop_count is set by the study loops"),
        (["loops", "seed=2"], "seed is set by the study"),
        (["loops", "config=x.yaml"], "config is set by the study"),
        (["loops", "job=2"], r"unknown option job; did you mean jobs\?"),
        (["loops", "foo=3"], "unknown option foo; use arms, dry_run, dump_dir"),
        (["loops", "dump_dir="], "dump_dir is empty"),
        (["loops", "dump_dir=FOREIGN"], "has other files"),
        (["loops", "dump_dir=OTHER"], "is of the study mixers size=small"),
    ],
)
def test_mistakes(tmp_path, argv, words):
    (tmp_path / "FOREIGN").mkdir()
    (tmp_path / "FOREIGN" / "notes.txt").touch()
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "study.json").write_text('{"study": "mixers", "size": "small"}')
    argv = [arg.replace("=FOREIGN", f"={tmp_path}/FOREIGN") for arg in argv]
    argv = [arg.replace("=OTHER", f"={tmp_path}/OTHER") for arg in argv]
    argv += [] if any(arg.startswith("dump_dir") for arg in argv) else [f"dump_dir={tmp_path}/new"]
    with pytest.raises(UserError, match=words):
        main(argv)
    assert not (tmp_path / "new").exists()


CLAIM = {"claim": "c", "column": "bpb", "lower": {"arm": "a"}, "than": {"arm": "b"}}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"arms": {}}, "arms is empty"),
        ({"arms": {"a": None, "b": {}}}, "arms="),
        ({"arms": {"a": {"seed": 3}, "b": {}}}, "seed is set by the study"),
        ({"options": {"dump_dir": "x"}}, "dump_dir is set by the study"),
        ({"options": 3}, "options=3"),
        ({"sizes": {"small": 3}}, "small=3"),
        ({"seeds": 0}, "seeds=0"),
        ({"over": {"model.loop_count": 2}}, "over="),
        ({"over": {"model.loop_count": []}}, "over: model.loop_count"),
        ({"over": {"model.loop_count": [2, 2]}}, "over: model.loop_count"),
        ({"over": {"model.use_residual": [True]}}, "model.use_residual is in over"),
        ({"equal": "flops", "arms": {"a": {}, "b": {"steps": 7}}}, "equal=flops"),
        ({"columns": {"bpb": "min loss/val_bpb"}}, "columns: bpb: min"),
        ({"plots": [{"x": "steps"}]}, "plots: x=steps"),
        ({"plots": [{"x": "steps", "why": "loss/out"}]}, "why"),
        ({"claims": [CLAIM | {"column": "acc"}]}, "column=acc"),
        ({"claims": [CLAIM | {"lower": {"arm": 1}}]}, "no arm 1; use 'a', 'b'"),
        ({"claims": [CLAIM | {"lower": {"arm": "a", "optim.lr": 1}}]}, "optim.lr"),
        ({"claims": [{"claim": "c", "column": "bpb", "lower": {"arm": "a"}}]}, "than"),
    ],
)
def test_mistakes_in_a_file_are_found_before_any_run(tmp_path, changes, words):
    own = {
        "question": "?",
        "arms": {"a": {}, "b": {"model.use_residual": False}},
        "columns": {"bpb": "loss/val_bpb"},
        **changes,
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(UserError, match=words):
        main([str(tmp_path / "own.yaml"), "dry_run=true"])


def test_facts_that_runs_share_are_written_once():
    assert report.merged(["n=8, name=copy", "n=16, name=copy"]) == "n=8/16, name=copy"
    assert report.merged(["1 x H200, bf16", "CPU"]) == "1 x H200, bf16; CPU"
    assert report.merged([]) == ""


def test_other_options_need_another_folder(tmp_path):
    study = read_study("loops", "tiny")
    record = command.update_record(tmp_path, study, {"arm=fixed,seed=1": {"steps": 3}})
    (tmp_path / "study.json").write_text(json.dumps(record))
    more = {"arm=fixed,seed=1": {"steps": 3}, "arm=fixed,seed=2": {"steps": 3}}
    assert command.update_record(tmp_path, study, more)["runs"] == more
    assert record["plots"] == study.plots and record["columns"] == study.columns  # for lt2 plot
    with pytest.raises(UserError, match="steps: 3 -> 4"):
        command.update_record(tmp_path, study, {"arm=fixed,seed=1": {"steps": 4}})


def test_the_table_of_results_has_a_verdict_for_each_study():
    text = (STUDIES.parents[3] / "docs/results/README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "| `lt2 study" in line]
    assert {command.split()[-1].strip("`") for *_, command in rows} == set(NAMES)
    for _, _, ours, linked, repeated in rows:
        verdict = linked.split("]")[0].strip("[")
        assert verdict in ("holds", "fails", "inconclusive", "not run")
        name = repeated.split()[-1].strip("`")
        assert linked == (verdict if verdict == "not run" else f"[{verdict}]({name}.md)")
        assert (ours == "-") == (verdict == "not run"), "a verdict has its numbers"
