"""What a launch would do, for people: the files of its runs, what it deletes, and its script."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lingua.args import print_text
from lingua.slurm.code import code_to_copy, code_version
from lingua.slurm.plan import LOGS, RunPlan, is_free, old_name, run_files
from lingua.sweep import RECORD


def show(plans: Sequence[RunPlan], action: str, sweep: Path | None = None) -> None:
    """Print what a launch of these runs, which were checked, would do; nothing is touched."""
    print_text("\n".join(describe(plans, action, sweep)))


def describe(plans: Sequence[RunPlan], action: str, sweep: Path | None) -> Iterator[str]:
    """Lines of text, one for each run of a sweep, and what is alike in them once."""
    first = plans[0]
    texts = run_files(first)
    yield "stool: a dry run: nothing is written, renamed or run"
    if first.job.args.copy_code:
        each = " for each run" if len(plans) > 1 else ""
        code = describe_code(first.root, without=sweep or first.job.dump_dir)
        yield f"stool: would copy{each} {code}"
    for plan in plans:
        yield from describe_folder(plan, [f"{LOGS}/", *texts])
    if sweep is not None:
        yield f"stool: would write {sweep / RECORD}"
    others = " (others differ in name, folder and options)" if len(plans) > 1 else ""
    yield f"stool: {first.job.script} would be{others}"
    yield texts[first.job.script.name].rstrip("\n")
    yield f"stool: would {action}"


def describe_code(root: Path, without: Path) -> str:
    files = code_to_copy(root, without)
    n_bytes = sum(os.stat(root / file).st_size for file in files)
    folders = sorted({f"{file.parts[0]}/" for file in files if len(file.parts) > 1})
    n_beside = sum(len(file.parts) == 1 for file in files)
    places = ", ".join([*folders, *([f"{n_beside} files beside them"] if n_beside else [])])
    return (
        f"{len(files)} files of code, {n_bytes / 1e6:.3g} MB, from {root} ({code_version(root)}): "
        f"{places}"
    )


def describe_folder(plan: RunPlan, names: Sequence[str]) -> Iterator[str]:
    args, folder = plan.job.args, plan.job.dump_dir
    is_new = is_free(folder)
    if args.override and not is_new:
        yield f"stool: would rename {folder} to {old_name(folder)}"
    goes_on = "" if is_new or args.override else ", and leave what else is there"
    written = ", ".join([*(["code/"] if args.copy_code else []), *names])
    yield f"stool: would write to {folder}{goes_on}: {written}"
