"""stool without SLURM: what it writes, what it refuses, and that its job runs."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lingua.errors import UserError
from lingua.slurm.background import LocalOutput, fill_in_ngpu
from lingua.slurm.script import quote_sbatch
from lingua.stool import (
    Job,
    StoolArgs,
    import_script,
    launch_job,
    main,
    read_run_args,
    render_submit,
    submit,
)
from tests.lingua.stool_utils import files_below, held, json_lines
from tests.LT2.tiny_run import write_corpus

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "submit.slurm"


def some_job(**changes) -> Job:
    args = StoolArgs(
        config="run.yaml",
        nodes=2,
        ngpu=4,
        partition="gpu",
        account="lab",
        qos="high",
        constraint="h100",
        exclude="node[3,7]",
        overrides=["optim.lr=2e-4", "model.attention_pattern=4:1 -> full"],
    )
    return Job(
        args=replace(args, **changes),
        name="my run",
        config="",
        dump_dir=Path("/scratch/runs/my run"),
        workdir=Path("/home/me/LT2"),
        root=Path("/home/me/LT2"),
        python=Path("/home/me/LT2/.venv/bin/python"),
        time_limit="2-00:00:00",
    )


def test_submit_script_matches_the_golden_file():
    """To accept a change: python -c 'import tests.lingua.test_stool as t; t.write_golden()'"""
    assert render_submit(some_job()) == GOLDEN.read_text()


def write_golden() -> None:
    GOLDEN.write_text(render_submit(some_job()))


def test_unset_resources_leave_no_directive():
    bare = dict(account="", qos="", constraint="", exclude="")
    text = render_submit(replace(some_job(**bare), time_limit=""))
    for option in [*bare, "time"]:
        assert f"--{option}=" not in text


def test_srun_does_not_expand_a_percent_sign_in_a_folder(project, args, slurm):
    overrides = ["dump_dir=runs/50%j"]
    launch_job(replace(args, launcher="sbatch", partition="gpu", overrides=overrides))
    logs = f"{project}/runs/50%%j/logs/7"
    assert f"-o {logs}/%j_%t.out -e {logs}/%j_%t.err" in (slurm / "srun.log").read_text()


def test_the_job_runs_the_copied_code_where_stool_was_called(project, args):
    submit = launch_job(args)
    dump_dir = project / "runs" / "a b"
    assert submit == dump_dir / "submit.slurm"
    (seen,) = json_lines((dump_dir / "logs" / "local" / "run.out").read_text())
    assert seen["args"]["steps"] == 3 and seen["args"]["name"] == "try"
    assert seen["cwd"] == str(project) and seen["dump"] == str(dump_dir)
    assert Path(seen["file"]).is_relative_to(dump_dir / "code")
    assert "to stderr" in (dump_dir / "logs" / "local" / "run.err").read_text()

    # a relaunch runs the code of the first launch, without later edits
    helper = next(project.glob("project/*/helper.py"))
    helper.write_text("WORD = 'second'\n")
    subprocess.run(["bash", str(submit)], check=True, cwd="/")
    again = json_lines((dump_dir / "logs" / "local" / "run.out").read_text())
    assert again == [seen, seen] and seen["word"] == "first"


def test_overrides_win_and_the_config_is_kept_as_given(project, args, capfd):
    overrides = ["steps=9", "dump_dir=runs/c", "name=it's $HOME"]
    launch_job(replace(args, overrides=overrides, stdout=True))
    assert (project / "runs/c/base_config.yaml").read_text() == (project / "run.yaml").read_text()
    (seen,) = json_lines(capfd.readouterr().out)
    assert seen["args"] == {
        "name": "it's $HOME",
        "dump_dir": "runs/c",
        "steps": 9,
        "corpus": "",
        "optim": {"lr": 1.0},
    }


def test_command_line(project, args, capfd):
    script = f"script={args.script}"
    main(["config=run.yaml", script, "launcher=bash", "nodes=1", "ngpu=1", "--", "steps=4"])
    out = (project / "runs/a b/logs/local/run.out").read_text()
    assert json_lines(out)[0]["args"]["steps"] == 4


def test_an_option_of_the_run_belongs_after_the_dashes(args):
    with pytest.raises(UserError, match="unknown option steps; .*after `--`"):
        main([f"config={args.config}", "steps=2", "--", "dump_dir=x"])


def test_a_config_is_utf_8_in_any_locale(project, args, monkeypatch):
    (project / "run.yaml").write_text("# für später\ndump_dir: runs/u\n", encoding="utf-8")
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    program = "import sys; from lingua.stool import main; main(sys.argv[1:])"
    options = ["config=run.yaml", f"script={args.script}", "launcher=bash", "nodes=1", "ngpu=1"]
    subprocess.run([sys.executable, "-c", program, *options], check=True)
    kept = (project / "runs" / "u" / "base_config.yaml").read_text(encoding="utf-8")
    assert kept == (project / "run.yaml").read_text(encoding="utf-8")


def test_a_config_from_python_is_written_as_yaml(project, args):
    launch_job(replace(args, config={"dump_dir": "runs/m", "optim": {"lr": 0.5}}))
    (seen,) = json_lines((project / "runs/m/logs/local/run.out").read_text())
    assert seen["args"]["optim"] == {"lr": 0.5}


def test_several_processes_on_this_machine_without_slurm(project, args):
    launch_job(replace(args, ngpu=2))
    seen = json_lines((project / "runs/a b/logs/local/run.out").read_text())
    assert sorted(line["rank"] for line in seen) == ["0", "1"]


def test_sbatch_gets_the_script_and_srun_starts_every_rank(project, args, slurm, capfd):
    launch_job(replace(args, launcher="sbatch", nodes=2, ngpu=4, partition="gpu", stdout=True))
    dump_dir = project / "runs" / "a b"
    assert (slurm / "sbatch.log").read_text().strip() == str(dump_dir / "submit.slurm")
    assert "-n 8 -N 2" in (slurm / "srun.log").read_text()
    assert [line["rank"] for line in json_lines(capfd.readouterr().out)] == ["0", "1"]
    assert "#SBATCH --time=2-00:00:00" in (dump_dir / "submit.slurm").read_text()
    assert (dump_dir / "logs" / "7").is_dir()  # SLURM does not make it


def test_a_dependency_is_not_in_the_script(project, args, slurm):
    sbatch = slurm / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$1" >{slurm}/sbatch.log\n')
    submit = launch_job(replace(args, launcher="sbatch", dependency="afterok:12:13"))
    assert (slurm / "sbatch.log").read_text() == "--dependency=afterok:12:13\n"
    assert "--dependency" not in submit.read_text()


def test_launching_twice_writes_the_same_script(project, args, slurm):
    again = replace(args, launcher="sbatch", qos="x", dirs_exists_ok=True, partition="gpu")
    before = asdict(again)
    first = launch_job(again).read_text()
    assert launch_job(again).read_text() == first
    assert asdict(again) == before
    assert first.count("--qos=x") == 1


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Map paths to time of change and size."""
    paths = [folder, *(path for path in folder.rglob("*") if "__pycache__" not in path.parts)]
    stats = {str(path): path.lstat() for path in paths if ".git" not in path.parts}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


@pytest.mark.parametrize("change", [{}, dict(override=True), dict(dirs_exists_ok=True)])
def test_a_dry_run_shows_everything_and_writes_nothing(project, args, slurm, capfd, change):
    dump_dir = project / "runs" / "a b"
    if change:
        launch_job(args)
        (dump_dir / "checkpoint").write_text("weights")
    asked = replace(args, launcher="sbatch", dependency="afterok:7", **change)
    import_script(args.script)  # Python caches its bytecode
    capfd.readouterr()
    before = state_of(project)
    assert launch_job(replace(asked, dry_run=True)) == dump_dir / "submit.slurm"
    assert state_of(project) == before and not (slurm / "sbatch.log").exists()
    out = capfd.readouterr().out
    files = re.search(r"would write to .*a b(?:, and .*)?: (.*)", out)
    code = re.search(r"would copy (\d+) files of code, (\S+) MB, from .* \(commit .*\): (.*)", out)
    assert files is not None and code is not None and len(out.splitlines()) < 45
    assert code[3] == ".gitignore, project/, run.yaml" and 1e-4 < float(code[2]) < 0.01
    assert ("would rename" in out) == ("override" in change)
    assert ("keep its other files" in out) == ("dirs_exists_ok" in change)
    assert f"stool: would run: sbatch --dependency=afterok:7 '{dump_dir}/submit.slurm'" in out

    # a launch does the same
    script = launch_job(replace(asked, dependency="")).read_text()
    assert script in out
    written = files_below(dump_dir) - {"checkpoint"}
    written = {name for name in written if not name.startswith("logs/") and name != ".lock"}
    copied = {name for name in written if name.startswith("code/")}
    assert len(copied) == int(code[1])
    assert written - copied | {"code/", "logs/"} == set(files[1].split(", "))


def test_a_dry_run_finds_the_same_mistakes(project, args, slurm, capfd):
    with pytest.raises(UserError, match="partition=typo"):
        launch_job(replace(args, launcher="sbatch", partition="typo", dry_run=True))
    with pytest.raises(UserError, match="dump_dir=/proc/x: cannot write there"):
        launch_job(replace(args, dry_run=True, overrides=["dump_dir=/proc/x"]))
    launch_job(args)
    dry = replace(args, dry_run=True, override=True)
    with held(project / "runs" / "a b") as pid, pytest.raises(UserError, match=f"process {pid} "):
        launch_job(dry)
    assert "would" not in capfd.readouterr().out


def test_the_output_of_a_dry_run_may_be_cut_off(project, args):
    options = f"config=run.yaml script={args.script} launcher=bash nodes=1 ngpu=1 dry_run=true"
    command = f"{sys.executable} -m lingua.stool {options} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("stool: a dry run") and done.stderr == ""


@pytest.mark.parametrize("value", ["it's", 'a "b" \\ c', "x#y"])
def test_sbatch_reads_quoted_values(value):
    assert shlex.split(quote_sbatch(value)) == [value]


def test_without_a_copy_the_code_runs_in_place(project, args):
    launch_job(replace(args, copy_code=False))
    dump_dir = project / "runs" / "a b"
    (seen,) = json_lines((dump_dir / "logs/local/run.out").read_text())
    assert Path(seen["file"]).is_relative_to(project / "project")
    assert not (dump_dir / "code").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(overrides=["optim.lrr=1"]), "optim.lrr"),
        (dict(overrides=["steps=many"]), "steps"),
        (dict(overrides=["dump_dir="]), "dump_dir is empty"),
        (dict(config="absent.yaml"), "absent.yaml"),
        (dict(config=None), "config is not set"),
        (dict(config={"dump_dir": "x", "stepss": 1}), "stepss"),
        (dict(script="project.absent.train"), "script=project.absent.train"),
        (dict(script="lingua.errors"), "no TrainArgs"),
        (
            dict(script="./project/p/train.py"),
            "script=.* module.* script=project.p.train$",
        ),
        (dict(script=""), "script= must be a module"),
        (dict(config="."), "config=.* is a folder"),
        (dict(overrides=["dump_dir=run.yaml"]), "dump_dir=.*run.yaml is a file"),
        (dict(overrides=[f"dump_dir={'x' * 300}"]), "dump_dir=.*File name too long"),
        (dict(nodes=0), "nodes=0"),
        (dict(nodes=-1, launcher="sbatch"), "nodes=-1"),
        (dict(nodes=2), "launcher=bash nodes=2"),
        (dict(ngpu=65), "65 processes are too many"),
        (dict(launcher="sbatch", partition="typo"), "partition=typo"),
        (dict(dependency="afterok:1"), "dependency=afterok:1 needs launcher=sbatch"),
        (dict(anaconda="/absent"), "anaconda=/absent"),
        (dict(overrides=["dump_dir=/proc/x"]), "dump_dir=/proc/x: cannot write there"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(project, args, slurm, change, message):
    with pytest.raises(UserError, match=message):
        launch_job(replace(args, **change))
    assert not (project / "runs").exists()
    assert not (slurm / "sbatch.log").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("import no_such_package", "No module named 'no_such_package'"),
        ("from json import no_such_name", "no_such_name"),
        ("def (", r"invalid syntax \(odd.py, line 1\)"),
        ("", "no TrainArgs"),
    ],
)
def test_a_script_that_cannot_be_imported_is_one_line(project, args, monkeypatch, text, message):
    name = args.script.replace(".train", ".odd")
    (project / f"{name.replace('.', '/')}.py").write_text(text)
    with pytest.raises(UserError, match=f"script={name}.*{message}") as caught:
        launch_job(replace(args, script=name))
    assert "\n" not in str(caught.value) and not (project / "runs").exists()


@pytest.mark.parametrize("script", ["apps.LT2.train"])
def test_the_scripts_of_this_repository_can_be_launched(tmp_path, script):
    """Their options are in another module. Their own checks run as well."""
    write_corpus(tmp_path)
    config: dict[str, Any] = {
        "dump_dir": str(tmp_path / "run"),
        "steps": 3,
        "model": {"dim": 32, "n_heads": 2},
        "data": {"root_dir": str(tmp_path), "sources": {"text": 1}},
    }
    given = StoolArgs(script=script, config=config, launcher="bash", nodes=1, ngpu=1)
    assert read_run_args(given, import_script(script)).steps == 3
    with pytest.raises(UserError, match="unknown option stepss"):
        read_run_args(replace(given, config={"stepss": 1}), import_script(script))
    config["model"]["dim"] = 33
    with pytest.raises(UserError, match="model.dim=33"):
        read_run_args(given, import_script(script))


def test_a_scripts_own_options_win_over_imported_ones(project, args):
    script = project / "project" / args.script.split(".")[1] / "eval.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from apps.LT2.training.args import TrainArgs as TrainArgs\n"
        "@dataclass\nclass EvalArgs:\n    dump_dir: str = ''\n    n_tasks: int = 1\n"
    )
    name = args.script.replace(".train", ".eval")
    given = replace(args, script=name, config={"dump_dir": "x", "n_tasks": 2})
    assert read_run_args(given, import_script(name)).n_tasks == 2


@pytest.mark.parametrize(
    "launcher, gpus, allocated, at_once, want",
    [
        ("sbatch", ["0"], "", 1, 8),
        ("bash", [], "", 1, 1),
        ("bash", ["0", "3", "5"], "", 1, 3),
        ("bash", ["0", "3", "5"], "", 2, 1),
        ("bash", [], "", 4, 1),
        ("bash", [], "4", 1, 4),  # in an allocation, seen from a login node
    ],
)
def test_ngpu_defaults_to_the_gpus_that_are_there(
    monkeypatch, launcher, gpus, allocated, at_once, want
):
    monkeypatch.setattr("lingua.slurm.background.visible_gpus", lambda: gpus)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", allocated)
    args = StoolArgs(config="run.yaml", launcher=launcher)
    assert fill_in_ngpu(args, at_once).ngpu == want
    assert fill_in_ngpu(replace(args, ngpu=2), at_once).ngpu == 2


def test_a_run_here_starts_one_process_without_gpus(project, args):
    launch_job(replace(args, ngpu=-1, nodes=-1))
    text = (project / "runs" / "a b" / "submit.slurm").read_text()
    assert "torch.distributed.run" not in text and "-n 1 -N 1" in text


@pytest.mark.parametrize("change", [dict(launcher="sh"), dict(ngpu=0), dict(time=0)])
def test_impossible_settings_name_the_option(change):
    with pytest.raises(UserError, match=next(iter(change))):
        StoolArgs(**change)


def test_only_a_dry_run_works_without_sbatch(project, args, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    there = replace(args, launcher="sbatch")
    with pytest.raises(UserError, match="no sbatch"):
        launch_job(there)
    with pytest.raises(UserError, match="stepz"):  # a mistake in the config comes first
        launch_job(replace(there, overrides=["stepz=1"]))
    launch_job(replace(there, dry_run=True))
    launch_job(replace(there, dry_run=True, sweep={"steps": [1, 2]}))
    shown = capfd.readouterr().out
    assert "would run: sbatch" in shown and "run these 2 as one SLURM job array" in shown


def test_without_a_partition_slurm_chooses_it(project, args, slurm):
    text = launch_job(replace(args, launcher="sbatch")).read_text()
    assert "--partition" not in text and "--time=1-00:00:00" in text


def test_without_sinfo_slurm_chooses_the_time_limit(project, args, slurm):
    (slurm / "bin" / "sinfo").unlink()
    text = launch_job(replace(args, launcher="sbatch")).read_text()
    assert "--time" not in text


def test_a_failed_launch_is_one_line(project, args, slurm):
    sbatch = slurm / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 3\n")
    with pytest.raises(UserError, match="status 3"):
        launch_job(replace(args, launcher="sbatch"))


def test_a_local_run_prints_its_output_files_and_its_error(project, args, capfd, monkeypatch):
    logs = project / "runs" / "a b" / "logs" / "local"
    launch_job(args)
    assert f"stool: output goes to {logs}/run.out and run.err\n" in capfd.readouterr().out
    again = replace(args, dirs_exists_ok=True)
    with pytest.raises(UserError, match=f"status 1; see {logs}/run.err: no luck$"):
        launch_job(replace(again, overrides=["steps=13"]))
    capfd.readouterr()
    # an older error is not this run's
    monkeypatch.setattr("lingua.stool.launch_command", lambda job: ["bash", "-c", "exit 4"])
    with pytest.raises(UserError, match="status 4; see the messages above, or .*a b/logs$"):
        launch_job(again)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match="status 4"):
        launch_job(again)
    assert capfd.readouterr().out.count("output goes") == 1


@pytest.mark.parametrize(
    "script, end",
    [
        # the terminal sends Ctrl-C to both
        ("kill -INT $PPID; sleep 0.5; touch saved; exit 130", KeyboardInterrupt),
        (
            "trap 'touch saved; exit 3' TERM; kill $PPID; "
            "for i in {1..40}; do sleep 0.05; done; exit 4",
            UserError,
        ),
    ],
)
def test_a_stopped_launcher_waits_for_its_run(tmp_path, monkeypatch, script, end):
    monkeypatch.setattr("lingua.stool.launch_command", lambda job: ["bash", "-c", script])
    monkeypatch.chdir(tmp_path)
    ours = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with pytest.raises(end):
            submit(replace(some_job(launcher="bash"), dump_dir=tmp_path))
    finally:
        signal.signal(signal.SIGTERM, ours)
    assert (tmp_path / "saved").exists()


TORCHRUN = """Traceback (most recent call last):
[rank1]: ValueError: no such token
  raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============
  traceback : the first one
============
"""


@pytest.mark.parametrize(
    "text, last",
    [
        (TORCHRUN, "[rank1]: ValueError: no such token"),
        ("error: a: b\nWARNING later\n", "error: a: b"),
        ("  File ...\nAssertionError\n  traceback : To enable\n", "AssertionError"),
        (
            "[rank1]: OutOfMemoryError: mine\n[rank0]: RuntimeError: Connection closed by peer\n",
            "[rank1]: OutOfMemoryError: mine",
        ),
        ("one\n  two \n\n-----\n", "two"),
        ("x" * 400, "x" * 300),
        ("\n", ""),
    ],
)
def test_the_error_of_a_run_is_found_in_its_output(tmp_path, text, last):
    job = replace(some_job(launcher="bash"), dump_dir=tmp_path)
    (tmp_path / "logs" / "local").mkdir(parents=True)
    (tmp_path / "logs" / "local" / "run.err").write_text("error: of old\n")
    output = LocalOutput(job)
    assert output.explain() == ""
    with open(output.err, "a") as file:
        file.write(text)
    assert output.explain() == last


def test_a_conda_environment_is_activated_if_there_is_conda(tmp_path):
    environment = tmp_path / "env"
    (environment / "conda-meta").mkdir(parents=True)
    (environment / "bin").mkdir()
    python = environment / "bin" / "python"
    python.symlink_to(sys.executable)
    text = render_submit(replace(some_job(), python=python))
    assert f"conda activate {environment}" in text and str(python) in text
    assert "conda" not in render_submit(some_job())
