"""A sweep: one run for each combination of values, and a table of the results.

    python -m lingua.sweep runs/tune                            # a sweep, also while it runs
    python -m lingua.sweep runs/tune mean=seed sort=val         # means over seeds, best first
    python -m lingua.sweep runs 'old/*' columns=run,lr,val format=csv

RUNS are dump_dirs of runs, folders of runs and sweeps, or globs of these. The table has the swept
options and other options that differ. Names may be shortened to their end: mixer for
model.mixer.

The folder of a sweep is the config's dump_dir. It contains

    lr=0.0001,loop_count=4/   a run like any other, relaunched by its submit.slurm
    code/                     the copy of the code, to which `code` of each run links
    sweep.json                the options of each run
    submitit/                 logs of the jobs in SLURM
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingua.args import parse_args, print_text
from lingua.config.cli import split_paths
from lingua.config.help import format_value
from lingua.config.yaml import yaml_value
from lingua.errors import UserError, run_cli
from lingua.evaluations import label_of
from lingua.files.atomic import write_atomic
from lingua.run_table import FORMATS, build_table, format_as, format_for_terminal
from lingua.runs import read_runs
from lingua.slurm.run_list import RECORD, Options
from lingua.slurm.run_list import read_record as read_record


def combinations(sweep: Mapping[str, list[Any]]) -> dict[str, Options]:
    """Map labels of runs to their options. The last option changes fastest."""
    for option, values in sweep.items():
        if option in ("dump_dir", "name"):
            raise UserError(f"sweep.{option} is set for each run by the sweep; leave it out")
        if not values:
            raise UserError(f"sweep.{option}=[] needs values to try, e.g. [1, 2]")
    runs: dict[str, Options] = {}
    for values in itertools.product(*sweep.values()):
        options = dict(zip(sweep, values, strict=True))
        label = label_of(options)
        if label in runs:
            raise UserError(
                f"sweep repeats a value: {' '.join(as_arguments(options))}; a value with a comma "
                """needs quotes, also in the shell: 'sweep.word=["a,b", c]'"""
            )
        runs[label] = options
    return runs


def as_arguments(options: Options) -> list[str]:
    """Format options as command-line arguments that parse to the same values."""
    return [f"{option}={_as_yaml(value)}" for option, value in options.items()]


def _as_yaml(value: Any) -> str:
    text = format_value(value)
    with contextlib.suppress(ValueError):
        if yaml_value(text) == value:
            return text
    return json.dumps(value, ensure_ascii=False)  # quotes e.g. the string "null"


def write_record(folder: Path, runs: dict[str, Options]) -> None:
    """Add runs to the record of the sweep in `folder`."""
    write_atomic(folder / RECORD, json.dumps({**read_record(folder), **runs}, indent=2) + "\n")


def format_table(folder: Path) -> str:
    """Format a line for each run of a sweep, for this terminal."""
    return format_for_terminal(build_table(read_runs([folder])))


@dataclass
class TableArgs:
    dump_dir: str = ""  # a run, a sweep, or a folder of runs and sweeps; the same as RUNS
    mean: str = ""  # options to average over, e.g. seed: mean, standard deviation and n
    sort: str = ""  # columns to sort by, e.g. val, or -val for falling values
    columns: str = ""  # columns to show, e.g. mixer,val,speed/mfu: options, metrics, scores
    format: str = "table"  # table | csv | json | markdown

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"format={self.format} must be one of {', '.join(FORMATS)}")


def main(argv: list[str]) -> None:
    folders, options = split_paths(argv)
    args = parse_args(TableArgs, options, prog="python -m lingua.sweep RUNS...", doc=__doc__)
    given = [*folders, *([args.dump_dir] if args.dump_dir else [])]
    if not given:
        raise UserError("no runs given; name a run's dump_dir, a sweep, or a folder of runs")
    table = build_table(
        read_runs(given),
        columns=args.columns,
        sort=args.sort,
        mean=args.mean,
        is_named=args.format in ("csv", "json"),
    )
    print_text(format_as(table, args.format))


if __name__ == "__main__":
    run_cli(main)
