"""Show what a launch would do: the files of its runs, the renamed folders and the script."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lingua.args import print_text
from lingua.slurm.code import code_version, list_code
from lingua.slurm.plan import LOGS, is_free, old_name, run_files
from lingua.slurm.run_list import RECORD
from lingua.slurm.script import Job


def show(jobs: Sequence[Job], action: str, sweep: Path | None = None) -> None:
    """Print what launching these runs would do. `sweep` is the folder of a sweep."""
    print_text("\n".join(describe(jobs, action, sweep)))


def describe(jobs: Sequence[Job], action: str, sweep: Path | None) -> Iterator[str]:
    """Yield lines of text: one per run, and once what the runs share."""
    first, is_one = jobs[0], len(jobs) == 1
    texts = run_files(first)
    yield "stool: a dry run: nothing is written, renamed or run"
    if first.args.copy_code:
        each = "" if is_one else " once for all runs"
        code = describe_code(first.root, without=sweep or first.dump_dir)
        yield f"stool: would copy{each} {code}"
    names = [f"{LOGS}/", *texts]
    new = [job for job in jobs if is_free(job.dump_dir)] if sweep else []
    if new:
        yield f"stool: would write to {len(new)} new folders in {sweep}: {written(first, names)}"
        yield from (f"    {job.dump_dir.name}" for job in new)
    for job in jobs:
        if job not in new:
            yield from describe_folder(job, names)
    if sweep is not None:
        yield f"stool: would write {sweep / RECORD}"
    others = "" if is_one else " (the others differ in name, folder and options)"
    yield f"stool: {first.script} would be{others}"
    yield texts[first.script.name].rstrip("\n")
    yield f"stool: would {action}"


def describe_code(root: Path, without: Path) -> str:
    files = list_code(root, without)
    n_bytes = sum(os.stat(root / file).st_size for file in files)
    names = sorted({f"{file.parts[0]}/" if len(file.parts) > 1 else file.name for file in files})
    version, places = code_version(root), ", ".join(names)
    return f"{len(files)} files of code, {n_bytes / 1e6:.3g} MB, from {root} ({version}): {places}"


def describe_folder(job: Job, names: Sequence[str]) -> Iterator[str]:
    args, folder = job.args, job.dump_dir
    is_new = is_free(folder)
    if args.override and not is_new:
        yield f"stool: would rename {folder} to {old_name(folder)}"
    keep = "" if is_new or args.override else ", and keep its other files"
    yield f"stool: would write to {folder}{keep}: {written(job, names)}"


def written(job: Job, names: Sequence[str]) -> str:
    return ", ".join([*(["code/"] if job.args.copy_code else []), *names])
