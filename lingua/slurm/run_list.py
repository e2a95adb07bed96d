"""List the runs in a folder and the options that somebody chose differently.

config.yaml of a started run has all options, with the defaults and with values that the run derived
from others (model.max_seqlen, distributed.dp_replicate). The requested options are in

    base_config.yaml             after stool, the config as it was given; else all options
    submit.slurm                 the options after stool's `--`
    config.before_step_*.yaml    config.yaml before the run resumed with other options
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingua.args import flatten_dict, load_config_file
from lingua.config.help import format_value
from lingua.config.yaml import yaml_value
from lingua.errors import UserError
from lingua.slurm.plan import RUN_MARKS
from lingua.slurm.script import CONFIG_ARGUMENT

logger = logging.getLogger(__name__)

RECORD = "sweep.json"  # in the folder of a sweep: the options of each run
PER_RUN = ("dump_dir", "name", "checkpoint.path")  # options that always differ
MAPPING = "data.sources."  # runs may have other keys

Options = dict[str, Any]  # dotted option to value


def read_record(folder: Path) -> dict[str, Options]:
    """Read the options of each run of a sweep, by the run's folder. Empty without a sweep."""
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable ({error}); restore it, or move it away") from None


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
    derived: frozenset[str] = frozenset()  # requested options that got another value

    @property
    def lists_defaults(self) -> bool:
        """Whether `requested` has all options, as without stool."""
        return self.has_started and self.current.keys() <= self.requested.keys()


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
    derived = frozenset(o for o, value in requested.items() if initial.get(o) != value)
    changed = {o: v for o, v in current.items() if initial.get(o) != v and o not in derived}
    return RunOptions(current or requested, requested | changed, bool(current), derived)


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


def differing(runs: Sequence[RunOptions]) -> list[str]:
    """List the options that differ and were requested to differ, unlike derived values.

    An option may be missing in runs of older versions, and in runs without its section. It is
    listed if a run without it was launched by stool, whose config has only what somebody chose,
    or if it is a key of a mapping.
    """
    readable = [run for run in runs if run.current]
    # A run that has not started has no derived values.
    known = [run for run in runs if run.has_started] or readable

    def differs(option: str) -> bool:
        have = [run for run in readable if option in run.current]
        values = {format_value(run.current[option]) for run in have}
        asked = {format_value(run.requested[option]) for run in have if option in run.requested}
        is_default = asked == {"null"} or any(
            run.lists_defaults and option in run.derived for run in have
        )
        is_asked_by_some = bool(asked) and any(option not in run.requested for run in readable)
        is_chosen = len(asked) > 1 or is_asked_by_some and not is_default
        return is_chosen and (len(values) > 1 or is_missing(option, have))

    def is_missing(option: str, have: Sequence[RunOptions]) -> bool:
        if all(option in run.current for run in known):
            return False
        is_chosen = any(option in run.requested and not run.lists_defaults for run in have)
        return is_chosen or option.startswith(MAPPING)

    options = dict.fromkeys(option for run in known for option in run.current)
    return [option for option in options if option not in PER_RUN and differs(option)]
