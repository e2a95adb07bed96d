"""Run a study: arms x seeds of a recipe, several runs side by side, and a report of the results.

    python -m apps.LT2.scripts.study loops size=tiny dump_dir=runs/loops_tiny
    python -m apps.LT2.scripts.study loops size=small dump_dir=runs/loops jobs=12 minutes=10
    python -m apps.LT2.scripts.study mixers arms=[full,gdn] seeds=1 dry_run=true optim.lr=1e-3

A study is a file of apps/LT2/configs/studies, or a YAML file of your own. It names arms, seeds,
what to draw, and claims. Options of training apply to all runs. The same command skips finished
runs, resumes the others, and writes to dump_dir

    NAME.md       the report: claims with verdicts, table, plots, how to repeat it
    NAME.png      the first plot, and NAME.csv with its lines; NAME-2.png is the second
    NAME.jsonl    the results of each run
    arm=.../      a run like any other; `lt2 sweep`, `lt2 plot by=arm` and `lt2 report` read them
"""

from __future__ import annotations

import difflib
import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from apps.LT2.flops import train_flops_per_token
from apps.LT2.matching import QUANTITIES as MATCHES
from apps.LT2.matching import match_model
from apps.LT2.scripts.run_metrics import STUDY_RECORD
from apps.LT2.scripts.study_report import check_results, write_report
from apps.LT2.scripts.study_runs import SCRIPT, StudySweep, Then
from apps.LT2.scripts.study_spec import SET_BY_STUDY, Study, read_study
from apps.LT2.training.args import TrainArgs, check_and_build
from lingua.args import diff_configs, parse_args, print_text
from lingua.config.cli import split_paths
from lingua.config.yaml import yaml_value
from lingua.errors import UserError, run_cli
from lingua.evaluations import label_of
from lingua.files.atomic import write_atomic
from lingua.files.lock import LOCK_NAME, lock_folders, make_writable
from lingua.run_columns import scientific, short
from lingua.slurm.background import visible_gpus
from lingua.slurm.code import snapshot_for_all
from lingua.slurm.plan import import_script, plan_run, write_run
from lingua.slurm.run_list import Options
from lingua.slurm.run_names import group_by_text
from lingua.slurm.script import Job, StoolArgs
from lingua.slurm.sweep_plan import collected_warnings, is_done, named_errors, option_of
from lingua.sweep import as_arguments, write_record

STOP, KILL = 0.93, 0.98  # shares of minutes= after which runs stop, and are killed


@dataclass
class StudyArgs:
    """Options of `lt2 study`; `lt2 curriculum` has them too."""

    OTHER_OPTIONS: ClassVar = " Other options are training options, for all runs."

    size: str = "small"  # tiny: seconds, to test the command; small: minutes of a GPU; full
    dump_dir: str = ""  # folder of the study; required
    arms: list[str] | None = None  # arms to run; null = all
    seeds: int | None = None  # seeds of each arm; null = as the study says
    # runs side by side; null = one for each GPU, or for each CPU core. Several share a GPU
    jobs: int | None = None
    minutes: float | None = None  # stop after this time, which may be 0; null = when all are done
    dry_run: bool = False  # print the runs and their cost, and write nothing

    def __post_init__(self) -> None:
        for name in ("jobs", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.minutes is not None and self.minutes < 0:
            raise UserError(f"minutes={self.minutes:g} must be 0 or more")

    def check_arms(self, known: Collection[str]) -> None:
        if self.arms == []:
            raise UserError(f"arms=[] names no arm; use {', '.join(known)}, or null for all")
        for arm in self.arms or []:
            if arm not in known:
                raise UserError(f"arms: no arm {arm}; use {', '.join(known)}")


Args = TypeVar("Args", bound=StudyArgs)


# ---- the study


def split_options(
    cls: type[Args], argv: Sequence[str], prog: str, doc: str | None
) -> tuple[Args, Options]:
    """Separate the options of a command from training options."""
    own = {f.name for f in fields(cls)}
    mine = [arg for arg in argv if arg.partition("=")[0] in own or arg.startswith("-")]
    args = parse_args(cls, mine, prog=prog, doc=doc)
    known = [*own, *(f.name for f in fields(TrainArgs)), *SET_BY_STUDY]
    given: Options = {}
    for option, _, text in (arg.partition("=") for arg in argv if arg not in mine):
        if (first := option.partition(".")[0]) not in known:
            close = difflib.get_close_matches(first, known, n=1)
            advice = f"did you mean {close[0]}?" if close else f"use {', '.join(sorted(own))}"
            raise UserError(f"unknown option {option}; {advice}")
        given[option] = text
        with suppress(ValueError):
            given[option] = yaml_value(text)
    return args, given


def with_options(study: Study, given: Options) -> Study:
    """Add options of the command line to all runs. UserError if the study sets one."""
    of_arms = {option for arm in study.arms.values() for option in arm} | set(study.over)
    for option in given:
        if option in of_arms or option in SET_BY_STUDY:
            raise UserError(f"{option} is set by the study {study.name}; leave it out")
    return replace(study, options={**study.options, **given})


# ---- the runs


@dataclass
class Cell:
    """The runs of an arm that differ in the seed alone."""

    arm: str
    over: Options
    options: Options  # all that differ from the recipe
    flops: float  # of a run, in training
    parameters: int

    def swept(self, seed: int) -> Options:
        return {"arm": self.arm, **self.over, "seed": seed}

    def label(self, seed: int) -> str:
        return label_of(self.swept(seed))


def plan_cells(study: Study, arms: Sequence[str]) -> list[Cell]:
    """Check the options of `arms`, and choose their sizes and steps."""
    cells: list[Cell] = []
    target, budget = None, 0.0
    needed = dict.fromkeys([next(iter(study.arms)), *arms])
    for arm, values in product(needed, product(*study.over.values())):
        over = dict(zip(study.over, values, strict=True))
        options = {**study.options, **study.arms[arm], **over}
        with named_errors(label_of({"arm": arm, **over})):
            args, model = build(study, options)
            seq_len = args.data.seq_len
            if study.match is not None:
                measure = MATCHES[study.match]
                target = target or measure(model, seq_len)
                how: dict[str, Any] = {"quantity": study.match, "by": study.by}
                changes = match_model(args.model, target, seqlen=seq_len, **how)
                options |= {f"model.{name}": value for name, value in changes.items()}
                args, model = build(study, options)
        tokens = math.prod((args.data.batch_size, seq_len, args.grad_acc_steps))
        cost = tokens * train_flops_per_token(model, seq_len)
        budget, steps = budget or args.steps * cost, args.steps
        if study.equal == "flops":
            steps = max(1, round(budget / cost))
        options["steps"] = steps
        parameters = sum(p.numel() for p in model.parameters())
        cells.append(Cell(arm, over, options, steps * cost, parameters))
    return [cell for cell in cells if cell.arm in arms]


def build(study: Study, options: Options) -> Any:
    argv = [f"config={study.config}", *as_arguments(options), "dump_dir=study"]
    return check_and_build(parse_args(TrainArgs, argv), world_size=1)


def format_plan(study: Study, cells: Sequence[Cell]) -> str:
    lines = [f"study {study.name}, size={study.size}, seeds={study.seeds} for each arm:"]
    for cell in cells:
        facts = f"{cell.options['steps']} steps, {short(cell.parameters)} parameters, "
        name = label_of({"arm": cell.arm, **cell.over}).removeprefix("arm=")
        lines.append(f"  {name}: {facts}{scientific(cell.flops)} FLOPs")
    total = study.seeds * sum(cell.flops for cell in cells)
    return "\n".join(
        [*lines, f"  in all {study.seeds * len(cells)} runs, {scientific(total)} FLOPs"]
    )


def plan_jobs(study: Study, folder: Path, runs: Sequence[tuple[Cell, int]]) -> list[Job]:
    """Check all runs, and print their warnings. Some arms may leave options unused."""
    launch = {"launcher": "bash", "ngpu": 1, "dirs_exists_ok": True, "script": SCRIPT}
    jobs, warnings = [], {}
    swept = {cell.label(seed): cell.swept(seed) for cell, seed in runs}
    for label, (cell, seed) in zip(swept, runs, strict=True):
        own = {"seed": seed, "dump_dir": str(folder / label), "name": label}
        overrides = as_arguments({**cell.options, **own})
        with named_errors(label), collected_warnings() as found:
            jobs.append(plan_run(StoolArgs(config=study.config, overrides=overrides, **launch)))
        warnings[label] = [text for text in found if option_of(text) is None]
    for line in group_by_text(
        warnings, {cell.label(seed): cell.swept(seed) for cell, seed in runs}
    ):
        print(f"study: warning of {line}")
    return jobs


# ---- the command


def find_folder(args: StudyArgs, study: Study) -> Path:
    """Return the folder of the study. UserError if it has anything else, or is not given."""
    folder = Path(args.dump_dir).absolute()
    file = folder / STUDY_RECORD
    if not args.dump_dir:
        if not args.dry_run:
            raise UserError(
                "dump_dir is empty; name a folder for the results, e.g. dump_dir=runs/x"
            )
        return folder
    if file.exists():
        record = json.loads(file.read_text(encoding="utf-8"))
        if (record["study"], record["size"]) != (study.name, study.size):
            raise UserError(
                f"dump_dir={folder} is of the study {record['study']} size={record['size']}; name "
                "another folder"
            )
    elif folder.exists() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        raise UserError(f"dump_dir={folder} has other files; name a new folder for the study")
    return folder


def update_record(folder: Path, study: Study, runs: Mapping[str, Options]) -> dict[str, Any]:
    """Return the record of `folder` with `runs`. UserError if it has them with other options."""
    record: dict[str, Any] = {"study": study.name, "size": study.size, "seconds": 0.0, "runs": {}}
    if (file := folder / STUDY_RECORD).exists():
        record = json.loads(file.read_text(encoding="utf-8"))
    for label, options in runs.items():
        if changes := diff_configs(record["runs"].get(label, options), options):
            raise UserError(
                f"dump_dir={folder} has the study with other options ({changes[0]}); name another "
                "folder"
            )
    record["runs"] |= runs
    return record | {"plots": study.plots, "columns": study.columns}  # for lt2 plot


def run_jobs(
    jobs: Sequence[Job],
    at_once: int | None,
    costs: Mapping[Path, float],
    then: Then | None = None,
    **own: Any,
) -> list[str]:
    """Run jobs that are not done, and return the labels of failed jobs.

    then: returns the job after one that is done, by its label, and the cost of a step.
    """
    module = import_script(SCRIPT)
    left = [job for job in jobs if not is_done(module, job)]
    if len(left) < len(jobs):
        print(f"study: {len(jobs) - len(left)} of {len(jobs)} runs are done already")
    if not left or own["stop_at"] <= time.monotonic():
        return []
    code, _ = snapshot_for_all(left[0].root, left[0].dump_dir.parent)

    def follow(label: str) -> tuple[Job, float] | None:
        if then is None or (found := then(label)) is None:
            return None
        write_run(found[0], code)
        return found

    for job in left:
        write_run(job, code)
    gpus = visible_gpus()
    at_once = min(at_once or len(gpus) or len(os.sched_getaffinity(0)), len(left))
    where = f"GPU {', '.join(gpus)}" if gpus else "the CPU"
    print(f"study: {at_once} {'run' if at_once == 1 else 'runs'} at a time on {where}", flush=True)
    costs_of = [costs[job.dump_dir] for job in left]
    sweep = StudySweep(left, at_once, costs_of, gpus=gpus, then=follow, **own)
    sweep.run()
    return [run.label for run in sweep.runs if run.error]


@contextmanager
def limited(
    folder: Path,
    record: Mapping[str, Any],
    swept: dict[str, Options],
    started: float,
    minutes: float | None,
) -> Iterator[dict[str, Any]]:
    """Lock the folder, write the record, and yield the time limits of `run_jobs`."""
    seconds = math.inf if minutes is None else 60 * minutes
    make_writable("dump_dir", folder)
    with lock_folders({"dump_dir": folder}):
        write_atomic(folder / STUDY_RECORD, json.dumps(record, indent=1) + "\n")
        write_record(folder, swept)
        times = {"stop_at": started + STOP * seconds, "kill_at": started + KILL * seconds}
        yield {**times, "record": record, "file": folder / STUDY_RECORD}


def check_failed(failed: Sequence[str], folder: Path) -> None:
    """Raise UserError if runs have failed."""
    if failed:
        raise UserError(
            f"{len(failed)} runs failed, see {folder}/{failed[0]}/logs; the same command repeats "
            "them"
        )


def main(argv: list[str]) -> None:
    started = time.monotonic()
    names, options = split_paths(argv)
    prog = "python -m apps.LT2.scripts.study NAME"
    args, given = split_options(StudyArgs, options, prog, __doc__)
    if len(names) > 1:
        raise UserError(f"{names[1]}: write option=value; the study is {names[0]}")
    study = with_options(read_study(str(names[0]) if names else "", args.size), given)
    study = replace(study, seeds=args.seeds or study.seeds)
    check_results(study)
    args.check_arms(study.arms)
    folder = find_folder(args, study)
    cells = plan_cells(study, args.arms or list(study.arms))
    print_text(format_plan(study, cells))
    if args.dry_run:
        return
    # Seeds vary slowest, so that all arms have equally many when the time ends.
    runs = [(cell, seed) for seed in range(1, study.seeds + 1) for cell in cells]
    record = update_record(folder, study, {cell.label(seed): cell.options for cell, seed in runs})
    jobs = plan_jobs(study, folder, runs)
    costs = {folder / cell.label(seed): cell.flops for cell, seed in runs}
    swept = {cell.label(seed): cell.swept(seed) for cell, seed in runs}
    with limited(folder, record, swept, started, args.minutes) as own:
        failed = run_jobs(jobs, args.jobs, costs, **own)
        write_report(study, folder, record, given)
    check_failed(failed, folder)


if __name__ == "__main__":
    run_cli(main)
