"""Plan the runs of a sweep: check each of them, and leave out options that don't apply.

A script may have a function `options_without_effect(args)`, which maps the dotted options (or
sections) that change nothing in a run, whatever their values, to reasons. Its function
`is_done(args, world_size)` says whether an earlier launch of the run has finished.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from lingua.args import dataclass_to_dict
from lingua.errors import UserError
from lingua.evaluations import label_of
from lingua.slurm.plan import import_script, parse_run_args, plan_run
from lingua.slurm.run_list import Options
from lingua.slurm.run_names import group_by_text, name_group
from lingua.slurm.script import Job, StoolArgs
from lingua.slurm.sizes import Size, may_differ, read_sizes
from lingua.sweep import as_arguments, combinations


@dataclass(frozen=True)
class Sweep:
    """The planned runs of a sweep. Labels are the names of their folders."""

    name: str
    folder: Path
    options: dict[str, Options]  # swept options, by label
    jobs: dict[str, Job]
    done: set[str]  # labels of runs that have finished before
    notes: list[str]  # one line for each option that some runs leave out
    warnings: dict[str, list[str]]  # label to the warnings of its checks
    sizes: dict[str, Size]  # of the models, by label; empty if unknown
    partial: set[str]  # options without effect in some of the runs


def plan_sweep(args: StoolArgs) -> Sweep:
    """Check all runs. A mistake in any of them is a UserError, and nothing is written."""
    module, runs = import_script(args.script), combinations(args.sweep)
    plain = replace(args, sweep={}, array=None, match=None, by=StoolArgs.by)
    base = parse_run_args(plain, module)
    folder = Path(base.dump_dir).absolute()
    name = getattr(base, "name", "") or folder.name
    unused = {label: find_unused(plain, module, label, options) for label, options in runs.items()}
    counts = Counter(itertools.chain.from_iterable(unused.values()))
    partial = {option for option, count in counts.items() if count < len(unused)}
    runs, overrides, notes = leave_out(args, runs, unused)
    planned: dict[str, StoolArgs] = {}
    for label, options in runs.items():
        own = {"dump_dir": str(folder / label)}
        if hasattr(base, "name"):
            own["name"] = f"{name}_{label}"
        of_run = [*overrides[label], *as_arguments({**options, **own})]
        planned[label] = replace(plain, overrides=of_run)
    jobs, warnings = plan_runs(planned)
    check_different(jobs)
    sizes = {}
    if args.match or args.dry_run or may_differ(jobs):
        sizes = read_sizes(jobs, args.match, args.by)
    matched = {label: size.overrides for label, size in sizes.items() if size.overrides}
    for label, changes in matched.items():
        check_free(changes, args)
        overrides = [*planned[label].overrides, *changes]
        planned[label] = replace(planned[label], overrides=overrides)
    if matched:
        jobs, warnings = plan_runs(planned)
        texts = {label: [" ".join(changes)] for label, changes in matched.items()}
        notes += [f"match={args.match}: {line}" for line in group_by_text(texts, runs)]
    done = {label for label, job in jobs.items() if args.dirs_exists_ok and is_done(module, job)}
    ignored = {option_of(text) for texts in warnings.values() for text in texts} & partial
    if ignored:
        notes.append(f"some runs don't use {', '.join(sorted(map(str, ignored)))} of the config")
    warnings = {label: useful(texts, partial) for label, texts in warnings.items()}
    return Sweep(name, folder, runs, jobs, done, notes, warnings, sizes, partial)


def plan_runs(planned: Mapping[str, StoolArgs]) -> tuple[dict[str, Job], dict[str, list[str]]]:
    """Return the jobs and the warnings of their checks, by label."""
    jobs: dict[str, Job] = {}
    warnings: dict[str, list[str]] = {}
    for label, args in planned.items():
        with named_errors(label), collected_warnings() as warnings[label]:
            jobs[label] = plan_run(args)
    return jobs, warnings


def check_different(jobs: Mapping[str, Job]) -> None:
    """Refuse runs with the same options, for example with seed=[1, 1.0]."""
    seen: dict[str, str] = {}
    for label, job in jobs.items():
        options = dataclass_to_dict(job.run_args) | {"dump_dir": "", "name": ""}
        other = seen.setdefault(repr(options), label)
        if other != label:
            raise UserError(f"sweep: the runs {other} and {label} are the same; leave one out")


def check_free(changes: Iterable[str], args: StoolArgs) -> None:
    """Refuse options of `match` that the sweep sets itself."""
    for option in (change.partition("=")[0] for change in changes):
        if option in args.sweep:
            raise UserError(f"by={args.by} changes {option}, which the sweep sets; use another by=")


def is_done(module: ModuleType, job: Job) -> bool:
    find = getattr(module, "is_done", lambda run_args, world_size: False)
    with named_errors(job.dump_dir.name):
        return find(job.run_args, job.args.nodes * job.args.ngpu)


@contextmanager
def named_errors(label: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (in the run {label})") from None


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect warnings that are logged in the block, instead of printing them. No duplicates."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in found:
                found.append(record.getMessage())

    root, collectors = logging.getLogger(), list[logging.Handler]([Collector(logging.WARNING)])
    others, root.handlers = root.handlers, collectors
    try:
        yield found
    finally:
        root.handlers = others


# ---- options that don't apply


def useful(warnings: Iterable[str], partial: Collection[str]) -> list[str]:
    """Leave out warnings of options without effect that other runs of the sweep need."""
    return [text for text in warnings if option_of(text) not in partial]


def option_of(warning: str) -> str | None:
    """Return the option of a warning "option=value has no effect: ...", else None."""
    found = re.match(r"([\w.]+)(?:=.*?)? has no effect", warning)
    return found[1] if found else None


def find_unused(
    args: StoolArgs, module: ModuleType, label: str, options: Options
) -> dict[str, str]:
    find = getattr(module, "options_without_effect", None)
    if find is None:
        return {}
    with named_errors(label), collected_warnings():
        run = parse_run_args(
            replace(args, overrides=[*args.overrides, *as_arguments(options)]), module
        )
        return find(run)


def leave_out(
    args: StoolArgs, runs: Mapping[str, Options], unused: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Options], dict[str, list[str]], list[str]]:
    """Leave out the options that change nothing in a run, and runs that are equal without them.

    Return the options and overrides of each remaining run, by label, and a note for each option.
    """

    reasons: dict[str, str] = {}

    def is_unused(option: str, label: str) -> bool:
        for name, reason in unused[label].items():
            if option == name or option.startswith(f"{name}."):
                reasons[option] = reason
                return True
        return False

    def line(option: str, label: str) -> tuple[str, ...]:
        """Name the runs that differ from this one at most in the option."""
        return (option, *as_arguments({o: v for o, v in runs[label].items() if o != option}))

    # An option without effect has none with any of its values, also with its default.
    idle = {line(o, run) for run, options in runs.items() for o in options if is_unused(o, run)}
    kept: dict[str, Options] = {}
    overrides: dict[str, list[str]] = {}
    without: dict[str, dict[str, None]] = {}  # option to the labels of runs without it
    given = {text: text.partition("=")[0] for text in args.overrides}
    useful = {text for text, o in given.items() if not all(is_unused(o, run) for run in runs)}
    for label, options in runs.items():
        left_out = [option for option in options if line(option, label) in idle]
        of_run = {option: value for option, value in options.items() if option not in left_out}
        new_label = label_of(of_run, among=args.sweep)
        kept[new_label] = of_run
        left_out += [given[t] for t in given if t in useful and is_unused(given[t], label)]
        overrides[new_label] = [t for t in given if given[t] not in left_out]
        for option in left_out:
            without.setdefault(option, {})[new_label] = None
    for option in args.sweep:
        if all(option not in options for options in kept.values()):
            raise UserError(
                f"sweep.{option} changes nothing in any run: {reasons[option]}; leave it out"
            )
    notes = [
        f"{option} has no effect in {name_group(labels, kept)}: {reasons[option]}; left out"
        for option, labels in without.items()
    ]
    if len(kept) < len(runs):
        notes.append(f"without them, {len(kept)} of {len(runs)} runs differ")
    return kept, overrides, notes
