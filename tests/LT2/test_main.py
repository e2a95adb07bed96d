"""The command `lt2`, and help that is printed without torch."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from apps.LT2 import __main__ as lt2
from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.generate import GenerateArgs
from apps.LT2.scripts.export_weights import ExportArgs
from lingua.args import parse_args
from lingua.errors import UserError

ROOT = Path(__file__).parents[2]
MODULES = {name: module for name, (module, _) in lt2.COMMANDS.items()}
# Prints {command: help} of the commands in `sys.argv`, and fails if that imported torch.
HELP_WITHOUT_TORCH = """
import json, sys
from lingua.config.stand_in import replace_torch_for_help
replace_torch_for_help(["--help"])
from tests.LT2.test_main import help_of
print(json.dumps({name: help_of(name) for name in sys.argv[1:]}))
assert not hasattr(sys.modules["torch"], "__version__")
"""


def help_of(name: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(MODULES[name]).main(["--help"])
    return out.getvalue()


def run(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lt2", *argv])
    lt2.main()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_every_command_is_listed(argv, monkeypatch, capsys):
    run(monkeypatch, *argv)
    lines = capsys.readouterr().out.splitlines()
    for name, (_, meaning) in lt2.COMMANDS.items():
        assert any(line.split() == [*name.split(), *meaning.split()] for line in lines)
    assert max(map(len, lines)) <= 80


def test_ctrl_c_while_a_command_is_imported_is_no_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "train")
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_group_lists_its_own_commands(monkeypatch, capsys):
    run(monkeypatch, "benchmark", "--help")
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed and all(line.startswith("  benchmark ") for line in listed)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian", "steps=1"], "trian.*lt2 train"),
        (["benchmark", "prefil"], "benchmark prefil.*lt2 benchmark prefill"),
        (["benchmarks"], "benchmark"),
        (["config=x.yaml"], "--help"),
    ],
)
def test_unknown_commands_end_with_status_2(argv, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv)
    assert stop.value.code == 2
    with pytest.raises(UserError, match=message):
        lt2.list_commands(argv)
    assert capsys.readouterr().err.count("\n") == 1


def test_listing_imports_nothing_heavy():
    code = "import sys, apps.LT2.__main__ as lt2; lt2.list_commands([])\n"
    code += "assert not {'torch', 'numpy', 'omegaconf', 'argparse'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_command_runs_its_module_and_names_itself(monkeypatch, capsys):
    seen = []
    modules = {name: SimpleNamespace(main=seen.append) for name in MODULES.values()}
    monkeypatch.setattr(lt2.importlib, "import_module", modules.get)
    run(monkeypatch, "train", "steps=1", "name=a b")
    run(monkeypatch, "benchmark", "prefill", "--plot", "x.png")
    assert seen == [["steps=1", "name=a b"], ["--plot", "x.png"]]
    monkeypatch.undo()
    for argv in (["sweep", "-h"], ["benchmark", "loader", "-h"]):
        with pytest.raises(SystemExit):
            run(monkeypatch, *argv)
        text = capsys.readouterr().out
        assert text.startswith(f"usage: lt2 {' '.join(argv[:-1])} ")
        assert f"python -m {MODULES[' '.join(argv[:-1])]} " not in text


@pytest.mark.parametrize("name", MODULES)
def test_every_command_has_a_module(name):
    spec = importlib.util.find_spec(MODULES[name])
    assert spec is not None and spec.origin is not None
    assert "\ndef main(argv: " in Path(spec.origin).read_text()


@pytest.mark.parametrize("path", ["runs/tune/lr=0.1", "runs/demo/consolidated.pth"])
def test_every_name_of_a_checkpoint_is_read(path):
    for cls, more in ((GenerateArgs, []), (ExportArgs, ["format=hf", "out=x"])):
        for name in ("", "ckpt=", "ckpt_dir=", "dump_dir="):
            assert parse_args(cls, [name + path, *more]).ckpt == path
    for name in ("", "ckpt=", "ckpt_dir="):
        assert parse_args(EvalArgs, [name + path]) == EvalArgs(ckpt_dir=path)


def test_the_console_script_is_this_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lt2": f"{lt2.__name__}:{lt2.main.__name__}"}


def test_help_without_torch_is_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_TORCH, *MODULES],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    want = {name: help_of(name) for name in MODULES}
    assert all(want.values()) and json.loads(run.stdout) == want


def test_help_of_a_section_starts_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "apps.LT2.train", "--help", "model.gdn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("model.gdn\n") and "model.kda" not in done.stdout
    assert "torch._C" not in done.stderr


@pytest.mark.parametrize("given, used", [(None, "passive"), ("active", "active")])
def test_waiting_threads_sleep_unless_the_user_wants_otherwise(given, used):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given is not None:
        env["OMP_WAIT_POLICY"] = given
    code = "import os, sys, apps.LT2; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout == f"{used} False\n", "set before torch reads it"
