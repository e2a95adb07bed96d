"""The tasks of the LM-Evaluation-Harness: looked up by name, then loaded with their data.

What is unknown or cannot be fetched is a UserError that says what would work. Tasks of one's own
lie in `harness.include_path`; where all tasks do, the 14,000 of the harness are not even listed.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.LT2.evaluation.args import LMHarnessArgs
from lingua.errors import UserError, import_optional
from lingua.parallel.ranks import get_is_master

EXAMPLES = ("hellaswag", "arc_easy", "piqa")


def import_lm_eval(module: str = "lm_eval") -> Any:
    return import_optional(module, extra="eval", needed_by="harness.tasks")


def load_tasks(args: LMHarnessArgs) -> Any:
    """An lm_eval TaskManager whose `load` gives the tasks of `args`, which are loaded already."""
    manager = find_tasks(args)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in expand_names(args, manager):
        try:
            part = manager.load([spec])
        except UserError:
            raise
        except Exception as error:  # of many libraries, and of what a task itself runs
            raise UserError(
                f"harness.tasks: {_name(spec)} cannot be loaded: {_reason(error)}; where its data "
                "cannot be downloaded, run this once where it can (HF_HOME names the folder that "
                "keeps it), or use local tasks by harness.include_path"
            ) from error
        for kind, entries in part.items():
            loaded[kind].update(entries)
    check_documents(args, loaded["tasks"])
    manager.load = lambda task_list: loaded
    return manager


def check_documents(args: LMHarnessArgs, loaded: Mapping[str, Any]) -> None:
    """Refuse questions and examples that the tasks have not; the harness would stop half-way."""
    for name, numbers in (args.samples or {}).items():
        if name not in loaded:
            raise UserError(
                f"harness.samples.{name}: no task of that name is evaluated, but "
                f"{', '.join(sorted(loaded))}"
            )
        size = len(loaded[name].eval_docs)
        wrong = [number for number in numbers if not 0 <= number < size]
        if wrong:
            raise UserError(
                f"harness.samples.{name}: no question {wrong[0]}; the task has {size}, from 0 on"
            )
    if not args.num_fewshot:
        return
    for name, task in loaded.items():
        size = len(list(task.fewshot_docs() or ()))
        config = task.config
        # the harness draws one more where the question itself may be among them
        spare = int(config.fewshot_split is not None and config.fewshot_split == config.test_split)
        if args.num_fewshot + spare > size:
            raise UserError(
                f"harness.num_fewshot={args.num_fewshot}: {name} has {size} examples to draw from; "
                "ask for fewer, or evaluate that task by itself"
            )


def find_tasks(args: LMHarnessArgs) -> Any:
    """A TaskManager that knows all names in `args.tasks`; nothing is downloaded."""
    tasks = import_lm_eval("lm_eval.tasks")
    # Every rank would say the same.
    logging.getLogger("lm_eval").setLevel(args.verbosity if get_is_master() else "ERROR")
    options = {"include_path": args.include_path, "metadata": args.metadata}
    if args.include_path is not None:
        if not any(Path(args.include_path).rglob("*.yaml")):
            raise UserError(
                f"harness.include_path={args.include_path}: no *.yaml of a task in there (seen "
                f"from {Path.cwd()})"
            )
        manager = tasks.TaskManager(include_defaults=False, **options)
        if not _unknown(args, manager):
            return manager
    manager = tasks.TaskManager(**options)
    if unknown := _unknown(args, manager):
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        what = f"did you mean {' or '.join(close)}?" if close else f"e.g. {', '.join(EXAMPLES)}"
        raise UserError(
            f"harness.tasks: no task, group or tag {unknown[0]}; {what} All names: "
            "python -m apps.LT2.lm_eval ls tasks"
        )
    return manager


def expand_names(args: LMHarnessArgs, manager: Any) -> list[Any]:
    """The tasks of `args`, with patterns replaced by the names that they match."""
    specs: list[Any] = []
    for spec in args.tasks or []:
        matches = manager.match_tasks([spec]) if isinstance(spec, str) else []
        specs += [spec] if not matches or spec in matches else sorted(matches)
    return specs


def _unknown(args: LMHarnessArgs, manager: Any) -> list[str]:
    names = [_name(spec) for spec in args.tasks or [] if not _brings_its_own_config(spec)]
    return [name for name in names if not manager.match_tasks([name])]


def _brings_its_own_config(spec: Any) -> bool:
    if isinstance(spec, str):
        return Path(spec).suffix == ".yaml" and Path(spec).is_file()
    return "dataset_path" in spec or "custom_dataset" in spec or "group" in spec


def _name(spec: Any) -> str:
    return spec if isinstance(spec, str) else str(spec.get("task", spec.get("group", "a mapping")))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"
