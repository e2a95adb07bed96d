"""The runs in a folder, and the options in which they differ by somebody's choice.

A run that has begun has all of its options in config.yaml, defaults and what was filled in from
others (model.max_seqlen, distributed.dp_replicate) among them. What was asked for is

    base_config.yaml    by stool the config as it was given; else with all defaults in it
    submit.slurm        by stool, too: the options behind its `--`
    config.before_step_*.yaml    config.yaml before the run went on with other options
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lingua.args import flatten_dict, load_config_file
from lingua.config.help import describe_fields, format_value
from lingua.config.yaml import yaml_value
from lingua.errors import UserError
from lingua.slurm.plan import RUN_MARKS, import_script
from lingua.slurm.script import CONFIG_ARGUMENT

logger = logging.getLogger(__name__)

RECORD = "sweep.json"  # of a sweep: the options of each run; it tells the folder of one
FILLED_IN = ("dump_dir", "name", "checkpoint.path")  # options that each run has its own of

Options = dict[str, Any]  # dotted option -> value


def is_run(folder: Path) -> bool:
    return any(os.path.exists(folder / mark) for mark in RUN_MARKS)  # not, where it is closed


def find_runs(folder: Path) -> dict[str, Path]:
    """Name -> folder of the runs in `folder`, and of those of the sweeps in it ("tune/lr=0.1")."""
    runs = {}
    for path in sorted(folder.iterdir()):
        if is_run(path):
            runs[path.name] = path
        elif os.path.exists(path / RECORD) and os.access(path, os.R_OK):
            swept = (run for run in sorted(path.iterdir()) if is_run(run))
            runs.update({f"{path.name}/{run.name}": run for run in swept})
    return runs


@dataclass(frozen=True)
class RunOptions:
    now: Options  # all of them, or, where the run has not begun, those that were asked for
    first: Options  # the same when it began
    asked: Options
    has_begun: bool


def read_options(run: Path) -> RunOptions:
    """The run's options, as far as they can be read; what cannot is told."""
    try:
        asked = _read(run / "base_config.yaml") | read_overrides(run / "submit.slurm")
        now = _read(run / "config.yaml")
        earlier = sorted(run.glob("config.before_step_*.yaml"), key=_step)
        first = _read(earlier[0]) if earlier else now
    except (OSError, ValueError) as error:
        logger.warning("%s: its options are not known (%s)", run, error)
        return RunOptions({}, {}, {}, has_begun=False)
    return RunOptions(now or asked, first or asked, asked or first, has_begun=bool(now))


def _step(config: Path) -> int:
    return int(config.stem.rpartition("_")[2])


def _read(config: Path) -> Options:
    return flatten_dict(load_config_file(config), sep=".") if config.exists() else {}


def read_overrides(script: Path) -> Options:
    """What submit.slurm, if there is one, sets beside the config."""
    if not script.exists():
        return {}
    _, *behind = script.read_text(encoding="utf-8").split(CONFIG_ARGUMENT)  # of srun, and without
    options: Options = {}
    for word in shlex.split(behind[0].rpartition("\nelse\n")[0]) if behind else []:
        option, _, text = word.partition("=")
        value: Any = text
        with contextlib.suppress(ValueError):
            value = yaml_value(text)
        options |= flatten_dict({option: value}, sep=".")
    return options


def read_differences(folder: Path, script: str) -> dict[str, Options]:
    """Name -> the options that are not the same in all runs of `folder`, which is no sweep's, and
    the name as "run" among them. Left out is what nobody chose: defaults of the script's options,
    and what was filled in."""
    runs = {name: read_options(path) for name, path in find_runs(folder).items()}
    differ = differing(list(runs.values()), script)
    return {
        name: {"run": name} | {option: run.now[option] for option in differ if option in run.now}
        for name, run in runs.items()
    }


def differing(runs: Sequence[RunOptions], script: str) -> list[str]:
    # Of a run that has not begun only what was asked for is known, and not what that comes to.
    known = [run for run in runs if run.has_begun] or [run for run in runs if run.now]
    choices = chosen_values(runs)

    @cache
    def defaults() -> dict[str, str]:
        return read_defaults(script)

    def differs(option: str) -> bool:
        values = {repr(run.now[option]) for run in runs if option in run.now}
        return len(values) > 1 or any(option not in run.now for run in known)

    def is_chosen(option: str) -> bool:
        values = choices.get(option, set())
        return len(values) > 1 or bool(values) and values != {defaults().get(option)}

    options = dict.fromkeys(option for run in known for option in run.now)
    return [o for o in options if o not in FILLED_IN and differs(o) and is_chosen(o)]


def chosen_values(runs: Sequence[RunOptions]) -> dict[str, set[str]]:
    """Option -> its values, as text, that were asked for; defaults may be among them."""
    filled_in = {o for run in runs for o, value in run.asked.items() if run.first.get(o) != value}
    values: dict[str, set[str]] = {}
    for run in runs:
        later = {  # the run went on with it
            option: value
            for option, value in run.now.items()
            if run.first.get(option) != value and option not in filled_in
        }
        for option, value in [*run.asked.items(), *later.items()]:
            values.setdefault(option, set()).add(format_value(value))
    return values


def read_defaults(script: str) -> dict[str, str]:
    """Option -> default, as text. It takes seconds: a script imports torch."""
    options_class = getattr(import_script(script), "TrainArgs", None)
    if options_class is None:
        raise UserError(f"script={script}: has no TrainArgs, whose defaults are told from choices")
    return {field.path: field.default for field in describe_fields(options_class)}
