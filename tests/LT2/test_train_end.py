"""The end of a run: a finished run that is started again, and Ctrl-C."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest

import apps.LT2.train as app
from apps.LT2.training.args import fill_in_defaults
from lingua.errors import MachineFault, UserError
from tests.lingua.stool_utils import limited_files
from tests.LT2.tiny_run import (
    SMALL,
    checkpoint,
    clean_process,
    column,
    command_line,
    fingerprint,
    train,
    train_args,
    without_code_copy,
)

UNUSED = {
    "model.dim": 64,
    "model.loop_count": 4,
    "steps": 3,  # fewer than are done
    "name": "other",
    "logging.freq": 2,
    "checkpoint.dump.keep": 1,
    "data.sources.text": 2.0,
    "eval.validation.max_steps": 1,
}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("finished"), **SMALL, steps=4)


def test_a_finished_run_changes_nothing(data, finished, capfd):
    before = fingerprint(finished)
    train(data, finished, **SMALL, steps=4)
    assert fingerprint(finished) == before
    assert "nothing to do" in capfd.readouterr().out


def is_finished(data: Path, dump_dir: Path, **changes) -> bool:
    args = train_args(data, dump_dir, **{**SMALL, "steps": 4, **changes})
    return app.is_finished(fill_in_defaults(args, 258, 1))


@pytest.mark.parametrize("option, value", UNUSED.items())
def test_a_finished_run_refuses_other_options(data, finished, option, value):
    with pytest.raises(UserError, match=rf"finished run: {option}[.: ]") as caught:
        is_finished(data, finished, **{option: value})
    assert "; " not in str(caught.value), "more options than the given one"


def test_a_finished_run_lists_all_other_options(data, finished):
    before = fingerprint(finished)
    with pytest.raises(UserError, match=r"optim.clip: .*; steps: 4 -> 3\."):
        train(data, finished, **SMALL, steps=3, **{"optim.clip": 2.0})
    assert fingerprint(finished) == before


def test_a_finished_run_may_be_moved_and_be_older_than_an_option(data, finished, tmp_path):
    moved = shutil.copytree(finished, tmp_path / "moved")
    params = checkpoint(moved, 4) / "params.json"
    saved = json.loads(params.read_text())
    saved["distributed"]["dp_replicate"] = 2
    del saved["optim"]["clip"], saved["probe_freq"]
    assert is_finished(data, moved)
    write_params(params, saved)
    assert is_finished(data, moved)
    with pytest.raises(UserError, match=r"finished run: optim.clip"):
        is_finished(data, moved, **{"optim.clip": 2.0})


def write_params(params: Path, saved: dict) -> None:
    """Replace params.json of a checkpoint, and its entry in the manifest."""
    params.write_text(json.dumps(saved))
    manifest = json.loads((params.parent / "manifest.json").read_text())
    digest = hashlib.sha256(params.read_bytes()).hexdigest()
    manifest["files"][params.name] = {"bytes": params.stat().st_size, "sha256": digest}
    (params.parent / "manifest.json").write_text(json.dumps(manifest))


def test_a_missing_evaluation_is_made_with_the_options_of_the_run(data, tmp_path):
    options = {"steps": 2, "eval.validation": None, **SMALL}
    train(data, tmp_path, **options)
    other = {**options, "eval.validation": "{}"}
    with pytest.raises(UserError, match=r"finished run: optim.lr: [^;]*$"):
        train(data, tmp_path, **{**other, "optim.lr": 1e-4})
    assert column(tmp_path, "loss/val") == []
    train(data, tmp_path, **other)
    assert len(column(tmp_path, "loss/val")) == 1


def test_a_limit_of_file_sizes_ends_a_run_with_one_line(data, tmp_path, capfd):
    with limited_files(20_000), pytest.raises(MachineFault, match="^could not write .*too large"):
        train(data, tmp_path, steps=1, **SMALL)
    assert "a checkpoint needs about" in capfd.readouterr().err, "a warning at the start"
    log = (tmp_path / "train.log").read_text()
    assert "the run ends: could not write" in log and "Traceback" not in log


# ---- Ctrl-C

STEP = app.Run.step


def test_ctrl_c_names_the_newest_checkpoint_and_the_command(data, tmp_path, monkeypatch, capfd):
    arguments = command_line(data, tmp_path / "a run", SMALL)

    def interrupted_after(step):
        def step_and_interrupt(self):
            STEP(self)
            if self.state.step == step:
                signal.raise_signal(signal.SIGINT)

        return step_and_interrupt

    monkeypatch.setattr(sys, "orig_argv", ["python3"])
    for step, newest in ((1, None), (5, 4)):
        monkeypatch.setattr(app.Run, "step", interrupted_after(step))
        with clean_process(), without_code_copy(), pytest.raises(KeyboardInterrupt):
            app.main(arguments)
        state, command = capfd.readouterr().err.splitlines()[-2:]
        assert state.endswith(f": {checkpoint(tmp_path / 'a run', 4)}" if newest else "is saved")
        words = shlex.split(command.partition(": ")[2])
        assert words == ["python3", "-m", "apps.LT2.train", *arguments]


def test_ctrl_c_of_a_stool_run_names_its_script(tmp_path, monkeypatch):
    (tmp_path / "submit.slurm").touch()
    args = app.TrainArgs(dump_dir=str(tmp_path))
    for name in ("SLURM_JOB_ID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert "apps.LT2.train" in app.how_to_resume(args, [])
    monkeypatch.setenv("DUMP_DIR", str(tmp_path))
    assert app.how_to_resume(args, []).endswith(f": bash {tmp_path}/submit.slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert app.how_to_resume(args, []).endswith(f": sbatch {tmp_path}/submit.slurm")
