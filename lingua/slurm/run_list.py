"""List the runs in a folder and the options that somebody chose differently.

config.yaml of a started run has all options, with the defaults and with values that the run derived
from others (model.max_seqlen, distributed.dp_replicate). The requested options are in

    base_config.yaml             after stool, the config as it was given; else all options
    submit.slurm                 the options after stool's `--`
    config.before_step_*.yaml    config.yaml before the run resumed with other options
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

RECORD = "sweep.json"  # in the folder of a sweep: the options of each run
PER_RUN = ("dump_dir", "name", "checkpoint.path")  # options that always differ

Options = dict[str, Any]  # dotted option to value


def is_run(folder: Path) -> bool:
    return any(os.path.exists(folder / mark) for mark in RUN_MARKS)  # False if it is not readable


def find_runs(folder: Path) -> dict[str, Path]:
    """Map names to the folders of runs, including runs in sweeps ("tune/lr=0.1")."""
    runs = {}
    for path in sorted(folder.iterdir()):
        if is_run(path):
            runs[path.name] = path
        elif os.path.exists(path / RECORD) and os.access(path, os.R_OK):
            runs |= {f"{path.name}/{p.name}": p for p in sorted(path.iterdir()) if is_run(p)}
    return runs


@dataclass(frozen=True)
class RunOptions:
    current: Options  # all options, or the requested ones if the run has not started
    requested: Options  # at the start or on a resume
    has_started: bool


def read_options(run: Path) -> RunOptions:
    """Read a run's options. Log a warning and return none if they are not readable."""
    try:
        requested = _read(run / "base_config.yaml") | read_overrides(run / "submit.slurm")
        current = _read(run / "config.yaml")
        before = sorted(
            run.glob("config.before_step_*.yaml"), key=lambda p: int(p.stem.rpartition("_")[2])
        )
        initial = _read(before[0]) if before else current
    except (OSError, ValueError) as error:
        logger.warning("%s: options are not readable (%s)", run, error)
        return RunOptions({}, {}, has_started=False)
    requested = requested or initial
    derived = {o for o, value in requested.items() if initial.get(o) != value}
    changed = {o: v for o, v in current.items() if initial.get(o) != v and o not in derived}
    return RunOptions(current or requested, requested | changed, has_started=bool(current))


def _read(config: Path) -> Options:
    return flatten_dict(load_config_file(config), sep=".") if config.exists() else {}


def read_overrides(script: Path) -> Options:
    """Read the options that submit.slurm adds to the config, if it exists."""
    if not script.exists():
        return {}
    # The command appears twice: for srun, and after `else` without SLURM.
    _, *commands = script.read_text(encoding="utf-8").split(CONFIG_ARGUMENT)
    options: Options = {}
    for word in shlex.split(commands[0].rpartition("\nelse\n")[0]) if commands else []:
        option, _, text = word.partition("=")
        value: Any = text
        with contextlib.suppress(ValueError):
            value = yaml_value(text)
        options |= flatten_dict({option: value}, sep=".")
    return options


def read_differences(folder: Path, script: str) -> dict[str, Options]:
    """Map names of runs to the options that differ, and to the name itself as "run".

    Leave out defaults of the script, and values that the runs derived from other options.
    """
    runs = {name: read_options(path) for name, path in find_runs(folder).items()}
    differ = differing(list(runs.values()), script)
    return {
        name: {"run": name} | {o: run.current[o] for o in differ if o in run.current}
        for name, run in runs.items()
    }


def differing(runs: Sequence[RunOptions], script: str) -> list[str]:
    # A run that has not started has no derived values.
    known = [run for run in runs if run.has_started] or [run for run in runs if run.current]
    defaults = cache(lambda: read_defaults(script))

    def differs(option: str) -> bool:
        values = {repr(run.current[option]) for run in runs if option in run.current}
        return len(values) > 1 or any(option not in run.current for run in known)

    def is_chosen(option: str) -> bool:
        asked = {format_value(run.requested[option]) for run in runs if option in run.requested}
        return len(asked) > 1 or bool(asked) and asked != {defaults().get(option)}

    options = dict.fromkeys(option for run in known for option in run.current)
    return [o for o in options if o not in PER_RUN and differs(o) and is_chosen(o)]


def read_defaults(script: str) -> dict[str, str]:
    """Map options to their defaults as text. Slow, because the script imports torch."""
    options_class = getattr(import_script(script), "TrainArgs", None)
    if options_class is None:
        raise UserError(f"script={script} has no TrainArgs, and so no defaults to compare with")
    return {field.path: field.default for field in describe_fields(options_class)}
