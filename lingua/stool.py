"""stool, the SLURM tool: check a config, keep the code it runs with, and submit the job.

    python -m lingua.stool script=apps.LT2.train config=run.yaml nodes=8 partition=gpu
    python -m lingua.stool config=run.yaml nodes=1 ngpu=1 launcher=bash -- steps=100 dump_dir=/tmp/x
    python -m lingua.stool config=run.yaml nodes=1 sweep.optim.lr=[1e-4,3e-4] array=1

Options before `--` are stool's own; those after it are the script's and win over the config. The
config is checked against the script's TrainArgs before anything is written; a script may check more
by a function `validate_before_submit(args, world_size)`. A function `input_paths(args)` may map
options to paths that the run reads; `override` does not rename a folder that contains one. With
dry_run=true stool only shows what it would write, rename and run. Else `dump_dir` gets

    code/               what git tracks or does not ignore; the job runs this copy
    code_version.json   the commit, and whether files differed from it
    base_config.yaml    the config as it was given
    submit.slurm        relaunches the run: sbatch submit.slurm, or bash submit.slurm without SLURM
    logs/               stdout and stderr of each rank

The job runs in the folder stool was called from, so that relative paths keep their meaning. With
`sweep` each combination of values is such a run, in a folder below `dump_dir` (see sweep.py); they
go to SLURM as one job array, or, with launcher=bash, are run here.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from lingua.args import parse_args
from lingua.errors import UserError, run_cli
from lingua.files.lock import lock_folders, make_writable
from lingua.slurm.background import (
    FOLDER,
    LocalOutput,
    check_slurm,
    failure,
    gpu_slots,
    has_slurm,
    import_submitit,
    local_output,
    run_command,
    run_here,
    start_here,
    submit_to_slurm,
)
from lingua.slurm.dry_run import show
from lingua.slurm.plan import (
    LOGS,
    RunPlan,
    import_script,
    parse_run_args,
    plan_run,
    write_run,
)
from lingua.slurm.plan import read_run_args as read_run_args
from lingua.slurm.script import Job as Job
from lingua.slurm.script import StoolArgs as StoolArgs
from lingua.slurm.script import render_submit as render_submit
from lingua.sweep import (
    RECORD,
    Options,
    as_arguments,
    combinations,
    format_table,
    read_record,
    write_record,
)


def launch_job(args: StoolArgs) -> Path:
    """Check, write and launch a run; the path of its submit.slurm, or of a sweep's record.

    `args` is not changed.
    """
    if args.sweep:
        return launch_sweep(args)
    plan = plan_run(args)
    if args.dry_run:
        show([plan], f"run: {shlex.join(launch_command(plan.job))}")
        return plan.job.script
    script = write_run(plan)
    submit(plan.job)
    return script


def launch_in_background(args: StoolArgs, *, gpus: str | None = None) -> Any:
    """As launch_job, and returns at once with submitit's handle of the job: in SLURM where
    `args.launcher` is sbatch, else in a process of this machine, on `gpus`."""
    assert not args.dry_run, "there is no handle of a job that is only shown"
    plan = plan_run(args)
    if args.launcher == "sbatch":
        check_slurm(plan.job)
    write_run(plan)
    folder = plan.job.dump_dir / FOLDER
    if args.launcher == "sbatch":
        return submit_to_slurm([plan.job], folder, name=plan.job.name)[0]
    return start_here(plan.job, folder, gpus=gpus)


# ---- sweeps


def launch_sweep(args: StoolArgs) -> Path:
    """Check all runs of a sweep, write them, and launch them; the path of their record."""
    import_submitit("a sweep")
    if args.stdout:
        raise UserError("stdout=true: runs of a sweep write to files, in the logs/ of each")
    runs = combinations(args.sweep)
    default = len(runs) if args.launcher == "sbatch" else 1
    at_once = min(args.array or default, len(runs))
    name, folder, plans = plan_sweep(args, runs)
    read_record(folder)  # which the runs are added to
    jobs = [plan.job for plan in plans]
    if args.launcher == "sbatch":
        if has_slurm() or not args.dry_run:  # what a sweep would be is shown anywhere
            check_slurm(jobs[0])
    else:
        gpu_slots(args.ngpu, at_once)  # refuses more than the machine has
    if args.dry_run:
        where = "as one SLURM job array" if args.launcher == "sbatch" else "here"
        action = f"run these {len(jobs)} {where}, {at_once} at a time, each by its script"
        command = shlex.join(run_command(jobs[0]))
        show(plans, f"{action}; the first: {command}", sweep=folder)
        return folder / RECORD
    make_writable("dump_dir", folder)
    with lock_folders({"dump_dir": folder}):
        for plan in plans:
            write_run(plan, without=folder)
        write_record(folder, runs)
    if args.launcher == "sbatch":
        handles = submit_to_slurm(jobs, folder / FOLDER, name=name, at_once=at_once)
        print(f"stool: job {handles[0].job_id.partition('_')[0]}, {len(jobs)} runs in {folder}")
        print(f"stool: their table: python -m lingua.sweep dump_dir={shlex.quote(str(folder))}")
    else:
        failed = run_sweep_here(jobs, folder / FOLDER, at_once)
        print(format_table(folder), flush=True)
        if failed:
            raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")
    return folder / RECORD


def plan_sweep(args: StoolArgs, runs: dict[str, Options]) -> tuple[str, Path, list[RunPlan]]:
    """Name and folder of the sweep, and its runs: each in a folder, and with a name, of its own."""
    args = replace(args, sweep={}, array=None)
    whole = parse_run_args(args, import_script(args.script))
    folder = Path(whole.dump_dir).absolute()
    name = getattr(whole, "name", "") or folder.name
    plans = []
    for label, options in runs.items():
        own = {"dump_dir": str(folder / label)}
        if hasattr(whole, "name"):
            own["name"] = f"{name}_{label}"
        overrides = [*args.overrides, *as_arguments({**options, **own})]
        plans.append(plan_run(replace(args, overrides=overrides)))
    return name, folder, plans


def run_sweep_here(jobs: list[Job], folder: Path, at_once: int) -> list[str]:
    """Run all of them, whatever becomes of one; what is to say of those that failed."""
    failed = []
    outputs = {job.dump_dir: local_output(job) for job in jobs}

    def tell(job: Job, handle: Any) -> None:
        problem = failure(handle)
        print(f"stool: {job.dump_dir.name}: {'failed' if problem else 'done'}", flush=True)
        if problem:  # submitit's own log is the place of what went wrong before the run
            own = last_error_in(outputs[job.dump_dir]) or f"{problem}, and {job.dump_dir / LOGS}"
            failed.append(f"{job.dump_dir.name} ({own})")

    run_here(jobs, folder, at_once=at_once, when_done=tell)
    return failed


# ---- launching


def launch_command(job: Job) -> list[str]:
    # On the command line alone: a relaunch does not wait for jobs that are long gone.
    wait_for = [f"--dependency={job.args.dependency}"] if job.args.dependency else []
    return [job.args.launcher, *wait_for, str(job.script)]


def submit(job: Job) -> None:
    command = launch_command(job)
    print(f"stool: {shlex.join(command)}", flush=True)
    output = local_output(job)
    if output is not None:
        print(f"stool: its output goes to {output.out} and {output.err.name}", flush=True)
    done = subprocess.run(command)
    if done.returncode != 0:
        raise UserError(
            f"{command[0]} {job.script}: ended with status {done.returncode}; "
            f"{where_it_complained(job, output)}"
        )


def where_it_complained(job: Job, output: LocalOutput | None) -> str:
    has_files = output is None and job.args.launcher == "bash" and not job.args.stdout
    above = f"its messages are above{f' or in {job.dump_dir / LOGS}' if has_files else ''}"
    return last_error_in(output) or above


def last_error_in(output: LocalOutput | None) -> str | None:
    error = output.last_error() if output is not None else None
    return f"see {output.err}: {error}" if output is not None and error else None


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    args = parse_args(
        StoolArgs,
        argv[:split],
        prog="python -m lingua.stool",
        description=(__doc__ or "").partition("\n\n")[0],
        examples=[
            "python -m lingua.stool config=run.yaml nodes=8 partition=gpu",
            "python -m lingua.stool config=run.yaml nodes=1 ngpu=1 launcher=bash -- steps=100",
            "python -m lingua.stool config=run.yaml nodes=8 partition=gpu dry_run=true",
            "python -m lingua.stool config=run.yaml nodes=1 'sweep.optim.lr=[1e-4,3e-4]' array=1",
        ],
    )
    launch_job(replace(args, overrides=[*args.overrides, *argv[split + 1 :]]))


if __name__ == "__main__":
    run_cli(main)
