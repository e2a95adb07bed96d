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
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingua.args import parse_args, print_text
from lingua.config.help import format_value
from lingua.config.yaml import yaml_value
from lingua.errors import UserError, run_cli
from lingua.evaluations import Evaluation, label_of, read_evaluations
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import read_jsonl_records
from lingua.slurm.run_list import RECORD, Options, is_run, read_differences
from lingua.slurm.script import StoolArgs

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
    metrics = {label: newest_metrics(folder / label) for label in runs}
    scores = {label: newest_scores(folder / label, metrics[label]) for label in runs}
    titles = list(dict.fromkeys(title for of_run in scores.values() for title in of_run))
    rows = [[*options, *COLUMNS, *titles]]
    for label, run in runs.items():
        shown = [format_value(run[option]) if option in run else "" for option in options]
        shown += [_format_number(metrics[label].get(key)) for key in COLUMNS.values()]
        rows.append(shown + [scores[label].get(title, "-") for title in titles])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ["<"] * len(options) + [">"] * (len(COLUMNS) + len(titles))
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


def newest_scores(run: Path, metrics: dict[str, Any]) -> dict[str, str]:
    """Map titles of columns to the newest scores of apps.LT2.eval.

    A title names the options that are not the run's own, and the chance level. A score of a step
    that is not the newest of training names its step. Left out is a validation loss with the run's
    own options that training has measured too.
    """
    columns = {}
    for evaluation in sorted(read_evaluations(run), key=lambda e: e.step or 0):
        is_own_loss = "loss/val" in evaluation.scores and not evaluation.label
        if is_own_loss and metrics.get("loss/val") is not None:
            continue
        at = "" if evaluation.step == metrics.get("global_step") else f" @{evaluation.step}"
        for title, score in _titled(evaluation):
            columns[title] = _format_number(score) + at
    return columns


def _titled(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """Yield the validation losses, and the first metric of each task."""
    seen = set()
    for key, score in evaluation.scores.items():
        task, _, metric = key.rpartition("/")
        name = metric.partition(",")[0]
        title = {"loss/val": "eval val", "loss/val_bpb": "eval bpb"}.get(key)
        if title is None and "," in metric and task not in seen and not name.endswith("_stderr"):
            seen.add(task)
            level = evaluation.chance.get(f"{task}/{name}")
            title = f"{task} {name}" + ("" if level is None else f" (chance {level:.2g})")
        if title is not None:
            yield f"{title} {evaluation.label}".rstrip(), score


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
