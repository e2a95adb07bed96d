"""A sweep: one run for each combination of values, and a table of the results.

    python -m lingua.sweep dump_dir=runs/tune         print the table of a sweep, at any time
    python -m lingua.sweep dump_dir=runs              the same for all runs and sweeps in a folder,
                                                      with the options that were chosen differently

The folder of a sweep is the config's dump_dir. It contains

    lr=0.0001,loop_count=4/   a run like any other, relaunched by its submit.slurm
    code/                     the copy of the code, to which `code` of each run links
    sweep.json                the options of each run
    submitit/                 logs of the jobs
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingua.args import parse_args, print_text
from lingua.config.help import format_value
from lingua.config.yaml import yaml_value
from lingua.errors import UserError, run_cli
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import read_jsonl_records
from lingua.slurm.run_list import RECORD, Options, is_run, read_differences
from lingua.slurm.script import StoolArgs

MAX_LABEL = 150  # bytes; file systems allow 255

COLUMNS = {  # title of a column to key in metrics.jsonl
    "step": "global_step",
    "loss": "loss/out",
    "val": "loss/val",
    "bpb": "loss/val_bpb",
    "tokens/s": "speed/tokens_per_s",
}


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
            raise UserError(f"sweep repeats a value: {' '.join(as_arguments(options))}")
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


def label_of(options: Options) -> str:
    """Name a run's folder after its options. Different options have different names."""
    short = [option.rpartition(".")[2] for option in options]
    names = short if len(set(short)) == len(short) else list(options)
    values = map(format_value, options.values())
    text = ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    label = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)[:MAX_LABEL]
    return label if label == text else f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_record(folder: Path, runs: dict[str, Options]) -> None:
    """Add runs to the record of the sweep in `folder`."""
    write_atomic(folder / RECORD, json.dumps({**read_record(folder), **runs}, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Options]:
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable ({error}); restore it, or move it away") from None


def format_table(folder: Path, script: str = StoolArgs.script) -> str:
    """Format one line per run: the options that differ, and the newest metrics.

    `folder` is a sweep, or contains runs and sweeps; see read_differences.
    """
    if not folder.is_dir():
        raise UserError(f"dump_dir={folder} is not a folder (seen from {os.getcwd()})")
    runs = read_record(folder) or read_differences(folder, script)
    if not runs:
        hint = f"; it is a run itself, use {folder.absolute().parent}" if is_run(folder) else ""
        raise UserError(f"dump_dir={folder} has no sweep (no {RECORD}) and no run{hint}")
    options = list(dict.fromkeys(option for run in runs.values() for option in run))
    rows = [[*options, *COLUMNS]]
    for label, run in runs.items():
        newest = newest_metrics(folder / label)
        shown = [format_value(run[option]) if option in run else "" for option in options]
        rows.append(shown + [_format_number(newest.get(key)) for key in COLUMNS.values()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ["<"] * len(options) + [">"] * len(COLUMNS)
    return "\n".join(
        "  ".join(f"{text:{a}{w}}" for text, a, w in zip(row, aligns, widths, strict=True)).rstrip()
        for row in rows
    )


def newest_metrics(run: Path) -> dict[str, Any]:
    """Read the newest value of every key in metrics.jsonl."""
    file = run / "metrics.jsonl"
    newest: dict[str, Any] = {}
    for record in read_jsonl_records(file) if file.exists() else []:
        newest.update(record)
    return newest


def _format_number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@dataclass
class TableArgs:
    dump_dir: str = ""  # folder of a sweep, or of runs and sweeps
    script: str = StoolArgs.script  # module that the runs ran; its TrainArgs has the defaults


def main(argv: list[str]) -> None:
    args = parse_args(TableArgs, argv, prog="python -m lingua.sweep", doc=__doc__)
    if not args.dump_dir:
        raise UserError("dump_dir is empty: use the folder of a sweep, or of runs")
    print_text(format_table(Path(args.dump_dir), args.script))


if __name__ == "__main__":
    run_cli(main)
