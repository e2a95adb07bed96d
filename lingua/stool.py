"""stool, the SLURM tool: check a config, copy the code, and submit the job.

    python -m lingua.stool script=apps.LT2.train config=run.yaml nodes=8 partition=gpu
    python -m lingua.stool config=run.yaml launcher=bash -- steps=100 dump_dir=/tmp/x
    python -m lingua.stool config=run.yaml launcher=bash 'sweep.optim.lr=[1e-4,3e-4]' array=2

Options before `--` are stool's. Options after it belong to the script and win over the config.
stool checks the config against the script's TrainArgs before it writes anything. A script may have
two functions: `validate_before_submit(args, world_size)` checks more, and `input_paths(args)` maps
options to paths that the run reads, which `override` never renames. With dry_run=true stool only
shows what it would write, rename and run. Otherwise it writes to `dump_dir`

    code/               the files that git tracks or does not ignore; the job runs this copy
    code_version.json   the commit, and whether files differed from it
    base_config.yaml    the config as it was given
    submit.slurm        relaunches the run: sbatch submit.slurm, or bash submit.slurm without SLURM
    logs/               stdout and stderr of each rank

The job runs in the folder where stool was called, so that relative paths stay valid. A `sweep`
launches one run for each combination of values, in folders below `dump_dir` (see sweep.py). The
runs are one SLURM job array, or, with launcher=bash, processes of this machine, `array` at a time.
The module `describe` in the script's package compares the sizes of their models, and `match` makes
these equal. See slurm/sweep_plan.py for further functions of a script.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from lingua.args import parse_args, print_text
from lingua.errors import UserError, run_cli
from lingua.files.lock import lock_folders, make_writable
from lingua.slurm.background import (
    FOLDER,
    LocalOutput,
    LocalProcess,
    check_slurm,
    fill_in_ngpu,
    gpu_slots,
    has_slurm,
    import_submitit,
    run_command,
    submit_to_slurm,
)
from lingua.slurm.code import code_version, snapshot_for_all
from lingua.slurm.dry_run import show
from lingua.slurm.local_sweep import LocalSweep
from lingua.slurm.plan import LOGS, plan_run, write_run
from lingua.slurm.plan import import_script as import_script
from lingua.slurm.plan import read_run_args as read_run_args
from lingua.slurm.run_list import RECORD
from lingua.slurm.run_names import group_by_text
from lingua.slurm.script import Job as Job
from lingua.slurm.script import StoolArgs as StoolArgs
from lingua.slurm.script import render_submit as render_submit
from lingua.slurm.sizes import differences, format_sizes
from lingua.slurm.sweep_plan import Sweep, plan_sweep, useful
from lingua.sweep import combinations, format_table, read_record, write_record


def launch_job(args: StoolArgs) -> Path:
    """Check, write and launch a run or a sweep.

    Return the path of the run's submit.slurm, or of the sweep's record.
    """
    if args.sweep:
        return launch_sweep(args)
    job = plan_run(args)
    if args.dry_run:
        show([job], f"run: {shlex.join(launch_command(job))}")
    else:
        write_run(job)
        submit(job)
    return job.script


def launch_in_background(args: StoolArgs, *, gpus: str | None = None) -> Any:
    """Launch a run and return its handle at once; see `failure` in lingua/slurm/background.py.

    The run is a SLURM job, or with launcher=bash a process of this machine on `gpus`.
    """
    assert not args.dry_run, "a dry run has no handle"
    job = plan_run(args)
    if args.launcher == "bash":
        write_run(job)
        return LocalProcess(job, gpus, detached=True)
    check_slurm(job)
    write_run(job)
    return submit_to_slurm([job], job.dump_dir / FOLDER, name=job.name)[0]


# ---- sweeps


def launch_sweep(args: StoolArgs) -> Path:
    """Check all runs of a sweep, write them and launch them. Return the path of their record."""
    is_slurm = args.launcher == "sbatch"
    if is_slurm:
        import_submitit("a sweep")
    if args.stdout:
        raise UserError("stdout=true: the runs of a sweep write to files, in logs/ of each")
    at_once = args.array or (sys.maxsize if is_slurm else 1)
    n_runs = len(combinations(args.sweep))
    print(f"stool: checking {n_runs} runs", flush=True)
    sweep = plan_sweep(fill_in_ngpu(args, min(at_once, n_runs)))
    folder, jobs = sweep.folder, [j for run, j in sweep.jobs.items() if run not in sweep.done]
    if not jobs:
        print(format_table(folder))
        print(f"stool: all {len(sweep.jobs)} runs are done already; nothing to do")
        return folder / RECORD
    at_once = min(at_once, len(jobs))
    read_record(folder)  # it must be readable
    if not is_slurm:
        gpu_slots(jobs[0].args.ngpu, at_once)  # this machine must have enough GPUs
    elif has_slurm() or not args.dry_run:
        check_slurm(jobs[0])
    warnings = group_by_text(sweep.warnings, sweep.options)
    notes = [*sweep.notes, *(f"warning of {line}" for line in warnings)]
    if sweep.done:
        notes.append(f"{len(sweep.done)} of {len(sweep.jobs)} runs are done already")
    if sweep.sizes:
        notes += differences(sweep.sizes, sweep.options, args.match)
    if args.dry_run:
        where = "as one SLURM job array" if is_slurm else "here"
        first = shlex.join(run_command(jobs[0]))
        action = f"run these {len(jobs)} {where}, {at_once} at a time; the first: {first}"
        show(jobs, action, sweep=folder)
        if sweep.sizes:
            print_text(f"\n{format_sizes(sweep.sizes, sweep.options)}\n")
    for note in notes:
        print_text(f"stool: {note}")
    if args.dry_run:
        return folder / RECORD
    make_writable("dump_dir", folder)
    with lock_folders({"dump_dir": folder}):
        code = None
        if args.copy_code:
            code, n_files = snapshot_for_all(jobs[0].root, folder)
            print(f"stool: copied {n_files} files of code to {code} ({code_version(jobs[0].root)})")
        for job in jobs:
            write_run(job, code)
        write_record(folder, sweep.options)
        if not is_slurm:
            run_sweep_here(sweep, jobs, at_once)
            return folder / RECORD
    handles = submit_to_slurm(jobs, folder / FOLDER, name=sweep.name, at_once=at_once)
    print(f"stool: job {handles[0].job_id.partition('_')[0]}, {len(jobs)} runs in {folder}")
    print(f"stool: for a table: python -m lingua.sweep {shlex.quote(str(folder))}")
    return folder / RECORD


def run_sweep_here(sweep: Sweep, jobs: list[Job], at_once: int) -> None:
    """Run jobs of a sweep, and print their warnings, the table of all runs, and the errors."""
    costs = [sweep.sizes[job.dump_dir.name].flops for job in jobs] if sweep.sizes else []
    local = LocalSweep(jobs, at_once, costs)
    try:
        local.run()
    finally:
        warnings = {run.label: useful(run.warnings, sweep.partial) for run in local.runs}
        for line in group_by_text(warnings, sweep.options):
            print(f"stool: warning of {line}")
        table = format_table(sweep.folder)
        print(table, flush=True)
        failed = {run.label: run.error for run in local.runs if run.error}
        shown = " ".join(table.split())  # with most errors
        unknown = {k: [e] for k, e in failed.items() if e.removeprefix("error: ") not in shown}
        for line in group_by_text(unknown, sweep.options):
            print(f"stool: failed: {line}", flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed, see {sweep.folder}/*/{LOGS}; to run them "
            "again, give the same command with dirs_exists_ok=true"
        )


# ---- launching


def launch_command(job: Job) -> list[str]:
    # Not in submit.slurm: a relaunch must not wait for jobs that ended long ago.
    wait_for = [f"--dependency={job.args.dependency}"] if job.args.dependency else []
    return [job.args.launcher, *wait_for, str(job.script)]


def submit(job: Job) -> None:
    command, output = launch_command(job), LocalOutput(job)
    print(f"stool: {shlex.join(command)}", flush=True)
    if job.args.launcher == "bash" and not job.args.stdout and "SLURM_JOB_ID" not in os.environ:
        print(f"stool: output goes to {output.out} and {output.err.name}", flush=True)
    status, interrupted = run_to_the_end(command)
    if interrupted:
        print(f"stool: to continue: {shlex.join(command)}", file=sys.stderr)
        raise KeyboardInterrupt
    if status != 0:
        error = output.explain()
        see = f"{output.err}: {error}" if error else f"the messages above, or {job.dump_dir / LOGS}"
        raise UserError(f"{command[0]} {job.script}: ended with status {status}; see {see}")


def run_to_the_end(command: list[str]) -> tuple[int, bool]:
    """Run a command, and return its status and whether Ctrl-C ended it.

    The terminal sends Ctrl-C to the command too, which may finish a checkpoint first. SIGTERM is
    forwarded: a run must not outlive its launcher unnoticed.
    """
    received: list[int] = []
    process: subprocess.Popen | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None and number == signal.SIGTERM:
            process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)  # before the start: no signal may be missed
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        process = subprocess.Popen(command)
        if signal.SIGTERM in received:
            process.terminate()
        return process.wait(), signal.SIGINT in received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    args = parse_args(StoolArgs, argv[:split], prog="python -m lingua.stool", doc=__doc__)
    launch_job(replace(args, overrides=[*args.overrides, *argv[split + 1 :]]))


if __name__ == "__main__":
    run_cli(main)
