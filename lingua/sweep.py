"""A sweep: one run for every combination of values, and a table of what came of them.

    python -m lingua.sweep dump_dir=runs/tune         prints the table of a sweep, as it stands
    python -m lingua.sweep dump_dir=runs              of all runs and sweeps in a folder: the
                                                      options that differ by choice

The folder of a sweep is the config's dump_dir; in it are

    lr=0.0001,loop_count=4/   a run of its own, as any other: it is relaunched by its submit.slurm
    sweep.json                the options of each run
    submitit/                 logs of the jobs
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingua.args import parse_args, print_text
from lingua.config.help import format_value
from lingua.config.yaml import yaml_value
from lingua.errors import UserError, run_cli
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import read_jsonl_records
from lingua.slurm.run_list import RECORD as RECORD
from lingua.slurm.run_list import Options as Options
from lingua.slurm.run_list import is_run, read_differences
from lingua.slurm.script import StoolArgs

logger = logging.getLogger(__name__)

MAX_LABEL = 150  # bytes; a name of a folder may have 255

COLUMNS = {  # of the table: title -> key in metrics.jsonl
    "step": "global_step",
    "loss": "loss/out",
    "val": "loss/val",
    "bpb": "loss/val_bpb",
    "tokens/s": "speed/tokens_per_s",
}


def combinations(sweep: Mapping[str, list[Any]]) -> dict[str, Options]:
    """Label -> options of every run; the last option changes fastest."""
    for option, values in sweep.items():
        if option in ("dump_dir", "name"):
            raise UserError(f"sweep.{option}: each run of a sweep has its own; leave it out")
        if not values:
            raise UserError(f"sweep.{option}=[]: name the values to try, e.g. [1, 2]")
    runs: dict[str, Options] = {}
    for values in itertools.product(*sweep.values()):
        options = dict(zip(sweep, values, strict=True))
        label = label_of(options)
        if label in runs:
            raise UserError(f"sweep: a value is there twice: {' '.join(as_arguments(options))}")
        runs[label] = options
    return runs


def as_arguments(options: Options) -> list[str]:
    """As they are given on a command line, which reads the same values from them."""
    return [f"{option}={_typed(value)}" for option, value in options.items()]


def _typed(value: Any) -> str:
    text = format_value(value)
    with contextlib.suppress(ValueError):
        if yaml_value(text) == value:
            return text
    return json.dumps(value, ensure_ascii=False)  # "null" as a text, a comma within an item


def label_of(options: Options) -> str:
    """A name for a folder that says which run it is; different for different options."""
    short = [option.rpartition(".")[2] for option in options]
    names = short if len(set(short)) == len(short) else list(options)
    values = map(format_value, options.values())
    text = ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    label = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)[:MAX_LABEL]
    return label if label == text else f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_record(folder: Path, runs: dict[str, Options]) -> None:
    """Add runs to those of the sweep in `folder`."""
    write_atomic(folder / RECORD, json.dumps({**read_record(folder), **runs}, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Options]:
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        runs = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable: {error}; restore it, or move it away") from None
    if not isinstance(runs, dict) or not all(isinstance(run, dict) for run in runs.values()):
        raise UserError(f"{file}: is no record of a sweep (options by run); move it away")
    return runs


def format_table(folder: Path, script: str = StoolArgs.script) -> str:
    """A line for each run of a sweep, or of any folder of runs: the options in which they differ
    (see read_differences), and the newest numbers of its metrics.jsonl."""
    if not folder.exists():
        raise UserError(f"dump_dir={folder}: no such folder (seen from {os.getcwd()})")
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"dump_dir={folder}: no folder that may be looked into")
    runs = read_record(folder) or read_differences(folder, script)
    if not runs:
        is_one = f"; it is a run itself, name {folder.absolute().parent}" if is_run(folder) else ""
        raise UserError(
            f"dump_dir={folder}: holds no sweep (no {RECORD}) and no folder of a run{is_one}"
        )
    options = list(dict.fromkeys(option for run in runs.values() for option in run))
    rows = [[*options, *COLUMNS]]
    for label, run in runs.items():
        newest = newest_metrics(folder / label)
        shown = [format_value(run[option]) if option in run else "" for option in options]
        rows.append(shown + [_number(newest.get(key)) for key in COLUMNS.values()])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(_line(row, widths, n_options=len(options)) for row in rows)


def _line(row: list[str], widths: list[int], n_options: int) -> str:
    cells: Iterator[str] = (
        text.ljust(width) if i < n_options else text.rjust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def newest_metrics(run: Path) -> dict[str, Any]:
    """The newest value of every key."""
    file = run / "metrics.jsonl"
    newest: dict[str, Any] = {}
    for record in read_jsonl_records(file) if file.exists() else []:
        newest.update(record if isinstance(record, dict) else {})
    return newest


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@dataclass
class TableArgs:
    dump_dir: str = ""  # folder of the sweep, or of any runs and sweeps
    # module that the runs ran, whose TrainArgs says which of their options are defaults
    script: str = StoolArgs.script


def main(argv: list[str]) -> None:
    args = parse_args(
        TableArgs,
        argv,
        prog="python -m lingua.sweep",
        description="Print the table of a sweep, or of the runs in a folder.",
        examples=[
            "python -m lingua.sweep dump_dir=runs/tune",
            "python -m lingua.sweep dump_dir=runs",
        ],
    )
    if not args.dump_dir:
        raise UserError("dump_dir is empty: name the folder of a sweep, or of runs")
    print_text(format_table(Path(args.dump_dir), args.script))


if __name__ == "__main__":
    run_cli(main)
