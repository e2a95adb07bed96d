"""The curriculum: stages that pass or fail, warm starts, resumes, the report, and mistakes."""

from __future__ import annotations

import json
import re
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apps.LT2.flops import cache_bytes, train_flops_per_token
from apps.LT2.scripts import curriculum as command
from apps.LT2.scripts import curriculum_report as report
from apps.LT2.scripts.curriculum import SPEC, CurriculumArgs, main, plan_chains, read_study
from apps.LT2.scripts.curriculum_report import Chain, Stage
from apps.LT2.scripts.study import build
from apps.LT2.scripts.study_spec import Study
from lingua.errors import UserError
from lingua.files.jsonl_log import read_jsonl_records
from tests.LT2.tiny_run import app as train_app
from tests.LT2.tiny_run import clean_process, without_code_copy


def run_here(jobs, at_once, costs, then, **own) -> list[str]:
    """Train one run after the other in this process."""
    left = list(jobs)
    while left:
        job = left.pop(0)
        with clean_process(), without_code_copy():
            train_app.main([f"config={SPEC.with_name('stage.yaml')}", *job.args.overrides])
        if (more := then(job.dump_dir.name)) is not None:
            left.append(more[0])
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two arms, of two stages each."""
    folder = tmp_path_factory.mktemp("curriculum") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_jobs", run_here)
        main([f"dump_dir={folder}", "size=tiny", "arms=[gdn,full]"])
    return folder


def run_of(folder: Path, arm: str, n: int) -> Path:
    return folder / f"arm={arm},loop_count=1,n={n},seed=1"


def test_the_report_has_what_the_runs_measured(folder):
    results = [json.loads(line) for line in (folder / "curriculum.jsonl").read_text().splitlines()]
    assert [(r["arm"], r["data.task.n"]) for r in results] == [
        (arm, n) for arm in ("full", "gdn") for n in (5, 6)
    ]
    for result in results:
        run = run_of(folder, result["arm"], result["data.task.n"])
        (last,) = [r for r in read_jsonl_records(run / "metrics.jsonl") if "acc/val" in r]
        assert result["passed"] and result["acc/val by steps"] == [[1, last["acc/val"]]]
        assert result["max_steps"] == 2
    text = (folder / "curriculum.md").read_text()
    for said in ("| gdn | 1 | 6 | 1 |", "1/1 @1", "Devices: 1 x CPU", "arm=gdn+nsa"):
        assert said in text
    assert "size=tiny 'arms=[gdn,full]' dump_dir=FOLDER" in text
    assert "- Task: n=5/6, name=state_tracking, " in text and "Equal in all arms" not in text
    assert (folder / "curriculum.png").stat().st_size > 10_000


def test_a_guess_is_the_majority_of_the_pointers_bits():
    assert [report.majority(n) for n in (1, 2, 5)] == [1, 3 / 4, 11 / 16]


def test_a_stage_starts_from_the_weights_before(folder):
    first, second = (run_of(folder, "gdn", n) for n in (5, 6))
    log = (second / "train.log").read_text()
    assert f"initial weights: {first}/checkpoints/0000000001" in log
    assert "differs from checkpoint.init_ckpt_path" not in log
    assert "step 1/2 " in log  # its own steps and optimizer


def test_more_stages_continue_and_old_weights_go(quick_python, folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    before = {n: (run_of(moved, "gdn", n) / "metrics.jsonl").read_bytes() for n in (5, 6)}
    argv = ["size=tiny", f"dump_dir={moved}", "arms=[gdn]", "n=[5,6,7]"]
    module = ["-m", "apps.LT2.scripts.curriculum"]
    done = quick_python.run(*module, *argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = r"run 1 of 1: arm=gdn,loop_count=1,n=7,seed=1: done .*: passed at step 1, accuracy \d"
    assert re.search(ended, done.stdout) and "nats" not in done.stdout
    assert before == {n: (run_of(moved, "gdn", n) / "metrics.jsonl").read_bytes() for n in (5, 6)}
    kept = {n: (run_of(moved, "gdn", n) / "checkpoints").exists() for n in (5, 6, 7)}
    assert kept == {5: False, 6: False, 7: True}
    text = (moved / "curriculum.md").read_text()
    assert "| gdn | 1 | 7 | 1 |" in text and "| full | 1 | >=6 | 1 |" in text
    assert "Commit" in text


def test_minutes_0_writes_the_report_again(folder, tmp_path, capsys):
    report_files = shutil.ignore_patterns("curriculum.*")
    again = shutil.copytree(folder, tmp_path / "again", ignore=report_files)
    main([f"dump_dir={again}", "size=tiny", "arms=[gdn,full]", "minutes=0"])
    assert (again / "curriculum.jsonl").read_text() == (folder / "curriculum.jsonl").read_text()
    assert "starts" not in capsys.readouterr().out


def test_a_target_below_a_guess_is_reported(folder, capsys):
    """So is the target of size=tiny, which untrained models reach."""
    main([f"dump_dir={folder}", "size=tiny", "arms=[gdn,full]", "minutes=0"])
    warning = report.format_warning(0, 11 / 16)
    assert warning in capsys.readouterr().out.splitlines()
    assert warning in (folder / "curriculum.md").read_text().splitlines()
    assert report.format_warning(0.9, 11 / 16) == ""


# ---- chains

STUDY = Study("curriculum", "?", {}, str(SPEC.with_name("stage.yaml")))


def chain_of(folder: Path, *stages: list[dict], steps: int = 40) -> Chain:
    """A chain with these records of its stages 8, 16, 32."""
    planned = []
    for n, records in zip((8, 16, 32), [*stages, [], [], []], strict=False):
        over = {"model.loop_count": 4, "data.task.n": n}
        stage = Stage("gdn", over, {"steps": steps}, 1e9, 1000, n, steps, 10, 20)
        run = folder / stage.label(1)
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        planned.append(stage)
    return Chain("gdn", 4, 1, planned, folder)


def at(step: int, accuracy: float, ended_by: str | None = None) -> dict:
    end = {"ended_by": ended_by} if ended_by else {}
    return {"global_step": step, "acc/val": accuracy, **end}


PASSED = [at(20, 0.5), at(40, 0.92, "eval.stop_at=acc/val>=0.9")]
EARLY = [at(20, 0.91, "eval.stop_at=acc/val>=0.9")]
RUNNING = [at(20, 0.5), {"global_step": 30, "loss/out": 1.0}]
FAILED = [at(20, 0.5), at(40, 0.6), {"global_step": 40, "loss/out": 1.0}]
UNMEASURED = [at(20, 0.5), {"global_step": 40, "loss/out": 1.0}]


@pytest.mark.parametrize(
    "stages, n_max, left, text",
    [
        ([], 0, 8, ">=0"),
        ([RUNNING], 0, 8, ">=0"),
        ([UNMEASURED], 0, 8, ">=0"),
        ([FAILED], 0, None, "0"),
        ([PASSED], 8, 16, ">=8"),
        ([EARLY, RUNNING], 8, 16, ">=8"),
        ([PASSED, FAILED], 8, None, "8"),
        ([PASSED, EARLY, PASSED], 32, None, "32"),
        ([FAILED, PASSED], 0, None, "0"),  # 16 is of a command without n=8
    ],
)
def test_n_max_and_the_next_stage(tmp_path, stages, n_max, left, text):
    chain = chain_of(tmp_path, *stages)
    stage = chain.next_stage()
    assert (chain.n_max, stage and stage.n) == (n_max, left)
    assert report.format_n_max([chain], 32) == text


@pytest.mark.parametrize(
    "records, steps, text",
    [
        (PASSED, 40, "passed at step 40, accuracy 0.920"),
        ([at(1500, 0.71)], 1500, "not passed, accuracy 0.710 after 1,500 steps"),
        (RUNNING, 40, "not finished, accuracy 0.500 after 20 steps"),
        ([{"global_step": 1, "loss/out": 1.0}], 40, ""),
    ],
)
def test_the_result_of_a_stage_is_its_accuracy(tmp_path, records, steps, text):
    chain = chain_of(tmp_path, records, steps=steps)
    assert command.format_outcome(chain.outcome(chain.stages[0])) == text


def test_a_row_has_every_seed(tmp_path):
    chains = [
        chain_of(tmp_path / "1", PASSED, EARLY, FAILED),
        chain_of(tmp_path / "2", EARLY, FAILED),
        chain_of(tmp_path / "3", PASSED, RUNNING),
    ]
    row = report.format_table(chains).splitlines()[-1]
    assert "| gdn | 4 | >=8 (16, 8, >=8) | 3 |" in row
    assert row.endswith("| 3/3 @40 | 1/2 @20 | 0/1 acc 0.60 |")


def test_rows_show_state_and_flops_at_the_same_n(tmp_path):
    short, long = chain_of(tmp_path / "1", PASSED), chain_of(tmp_path / "2", PASSED)
    short.arm = "full"
    del short.stages[2:]
    for chain in (short, long):
        for stage in chain.stages:
            stage.state_bytes, stage.flops_per_token = 10 * stage.n, 100 * stage.n
    rows = report.format_table([short, long]).splitlines()[2:]
    assert all("| 160B | 1.6e3 |" in row for row in rows)
    assert report.common_n([short, long]) == 16
    del short.stages[:]
    short.stages.append(replace(long.stages[0], n=7, state_bytes=70, flops_per_token=700))
    rows = report.format_table([short, long]).splitlines()[2:]
    assert "| 70B | 7.0e2 |" in rows[0] and "| 320B | 3.2e3 |" in rows[1]
    assert report.common_n([short, long]) is None


@pytest.mark.parametrize(
    "stages, text",
    [
        ([[FAILED], [PASSED, FAILED], [PASSED, EARLY]], "8 (0, 8, >=16)"),
        ([[PASSED, FAILED], [PASSED, EARLY], [PASSED, EARLY]], ">=16 (8, >=16, >=16)"),
    ],
)
def test_the_median_is_open_only_if_open_seeds_can_raise_it(tmp_path, stages, text):
    chains = [chain_of(tmp_path / str(i), *of_seed) for i, of_seed in enumerate(stages)]
    assert report.format_n_max(chains, 32) == text


OPEN = "inconclusive: a run is not finished"


def verdict_of(low, high, folder, monkeypatch, capsys) -> str:
    """Write a report that claims n_max of `low` is below that of `high`; return the verdict."""
    for chain in low:
        chain.arm = "gdn"
    for chain in high:
        chain.arm = "full"
    claim = {"claim": "c", "column": "n_max", "lower": {"arm": "gdn"}, "than": {"arm": "full"}}
    study = Study(
        "curriculum",
        "?",
        {},
        str(SPEC.with_name("stage.yaml")),
        columns={"n_max": "n_max"},
        claims=[claim],
    )
    monkeypatch.setattr(report, "draw_curves", lambda *_: None)
    monkeypatch.setattr(report, "format_facts", lambda *args: "")
    report.write_report(study, folder, {"commands": []}, [*low, *high], [])
    (verdict,) = re.findall(r"^(.*): c n_max", capsys.readouterr().out, re.M)
    return verdict


@pytest.mark.parametrize(
    "third, third_high, verdict",
    [
        ([FAILED], [PASSED, FAILED], "holds"),
        ([FAILED], [PASSED], "holds"),
        ([PASSED, RUNNING], [PASSED, FAILED], "inconclusive"),  # 8 is not below 8
        ([], [PASSED, FAILED], OPEN),
        ([FAILED], [], OPEN),
        ([PASSED, PASSED, PASSED], [PASSED, PASSED], "inconclusive"),  # none exceeds 32
    ],
)
def test_seeds_that_end_early_decide_nothing_alone(
    tmp_path, monkeypatch, capsys, third, third_high, verdict
):
    low = [
        chain_of(tmp_path / f"a{i}", *runs) for i, runs in enumerate([[FAILED], [FAILED], third])
    ]
    high = [
        chain_of(tmp_path / f"b{i}", *runs)
        for i, runs in enumerate([[PASSED, FAILED], [PASSED, FAILED], third_high])
    ]
    assert verdict_of(low, high, tmp_path, monkeypatch, capsys) == verdict


def test_a_chain_that_passed_all_of_fewer_stages_may_reach_more(tmp_path, monkeypatch, capsys):
    low = [chain_of(tmp_path / f"a{i}", PASSED) for i in range(2)]
    high = [chain_of(tmp_path / f"b{i}", PASSED, PASSED, FAILED) for i in range(2)]
    for chain in low:
        del chain.stages[1:]
    assert verdict_of(low, high, tmp_path, monkeypatch, capsys) == OPEN
    assert verdict_of(high, low, tmp_path, monkeypatch, capsys) == OPEN


def test_a_chain_whose_stage_fails_or_lost_its_weights_ends(tmp_path, monkeypatch, capsys):
    good, lost = chain_of(tmp_path / "a", RUNNING), chain_of(tmp_path / "b", PASSED)
    started = []

    def run_jobs(jobs, at_once, costs, **own):
        started.append(jobs)
        return [stage.label(seed) for stage, seed in jobs]

    monkeypatch.setattr(command, "run_jobs", run_jobs)
    monkeypatch.setattr(command, "plan_jobs", lambda study, folder, runs: runs)
    failed = command.run_chains(STUDY, tmp_path, [good, lost], 1, stop_at=time.monotonic() + 60)
    assert [[stage.n for stage, _ in jobs] for jobs in started] == [[8]]
    assert len(failed) == 2 and "checkpoints is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "missing, given, words",
    [
        ([32], [8, 16, 32], None),
        ([32], [8, 16], None),
        ([], [32], None),
        ([16], [8, 16, 32], "n=16 comes before"),
        ([32], [8, 32], "n leaves out 16"),
    ],
)
def test_new_stages_come_last(tmp_path, missing, given, words):
    chain = chain_of(tmp_path, PASSED, PASSED, PASSED)
    for stage in chain.stages:
        if stage.n in missing:
            (chain.run(stage) / "metrics.jsonl").unlink()
    with nullcontext() if words is None else pytest.raises(UserError, match=words):
        command.check_order([chain], given)


# ---- the plan


def test_state_and_flops_are_those_of_the_models():
    args = CurriculumArgs(size="small", dump_dir="x", arms=["full+gdn"], loops=[1, 4], n=[8, 64])
    study = read_study(args, {"model.dim": 64})
    chains = {(c.n_loops, c.seed): c for c in plan_chains(study, Path("x"))}
    assert list(chains) == [(T, seed) for seed in (1, 2, 3) for T in (1, 4)]
    short, long = chains[4, 1].stages
    for stage, seq_len in ((short, 52), (long, 332)):
        _, model = build(study, stage.options)
        assert stage.state_bytes == cache_bytes(model, seq_len, torch.bfloat16)
        assert stage.flops_per_token == train_flops_per_token(model, seq_len)
    assert long.state_bytes - short.state_bytes == 4 * 2 * 64 * (332 - 52) * 2  # loops, K and V
    assert short.state_bytes == 4 * chains[1, 1].stages[0].state_bytes


@pytest.mark.parametrize("given", [{}, {"data.batch_size": 3}])
def test_a_step_has_as_many_tokens_at_every_n(given):
    args = CurriculumArgs(size="small", dump_dir="x", arms=["gdn"], loops=[1], n=[8, 64, 256])
    stages = plan_chains(read_study(args, given), Path("x"))[0].stages
    sizes = [stage.options["data.batch_size"] for stage in stages]
    assert sizes == ([3, 3, 3] if given else [157, 24, 16])
    for stage, size, seq_len in zip(stages, sizes, (52, 332, 1292), strict=True):
        assert stage.flops == stage.flops_per_token * stage.steps * size * seq_len


@pytest.mark.parametrize(
    "argv, words",
    [
        (["size=huge"], "size=huge must be one of tiny, small, full"),
        (["arms=[gdn,foo]"], "no arm foo; use full, gdn"),
        (["n=[16,8]"], r"n=\[16,8\]|n=\[16, 8\]"),
        (["n=[]"], "ascending"),
        (["n=[8,300]"], "data.task.n=300"),
        (["loops=[4,4]"], "loops"),
        (["seeds=0"], "seeds=0"),
        (["jobs=0"], "jobs=0"),
        (["minutes=-1"], "minutes=-1"),
        (["model.loop_count=2"], "model.loop_count is set by the study curriculum"),
        (["gdn"], "gdn: write option=value"),
        (["arm=gdn"], r"unknown option arm; did you mean arms\?"),
        (["modle.dim=8"], r"unknown option modle.dim; did you mean model\?"),
        (["dump_dir="], "dump_dir is empty"),
        (["dump_dir=./mixers"], "is of the study mixers size=small"),
        (["dump_dir=./curriculum", "steps=7"], "other options .steps: "),
    ],
)
def test_mistakes(tmp_path, argv, words):
    study = read_study(CurriculumArgs(dump_dir="x", arms=["gdn"], n=[8], loops=[1]), {})
    stage = plan_chains(study, tmp_path)[0].stages[0]
    for name, runs in {"mixers": {}, "curriculum": {stage.label(1): stage.options}}.items():
        (tmp_path / name).mkdir()
        record = {"study": name, "size": "small", "seconds": 0, "runs": runs}
        (tmp_path / name / "study.json").write_text(json.dumps(record))
    argv = [
        arg.replace("dump_dir=", f"dump_dir={tmp_path}/") if "/" in arg else arg for arg in argv
    ]
    defaults = {"dump_dir": tmp_path / "new", "arms": "[gdn]", "loops": "[1]", "n": "[8]"}
    given = {arg.partition("=")[0] for arg in argv}
    argv += [f"{name}={value}" for name, value in defaults.items() if name not in given]
    with pytest.raises(UserError, match=words):
        main(argv)
    assert not (tmp_path / "new").exists()
