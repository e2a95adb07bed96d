"""Find the tasks of the LM-Evaluation-Harness by name, and load them with their data.

An unknown task, or data that cannot be downloaded, is a UserError. If all tasks are in
`harness.include_path`, the 14,000 tasks of the harness are not listed.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.LT2.evaluation.args import LMHarnessArgs
from lingua.errors import UserError, import_optional
from lingua.parallel.ranks import get_is_master

EXAMPLES = ("hellaswag", "arc_easy", "piqa")


def import_lm_eval(module: str = "lm_eval", *, needed_by: str = "harness.tasks") -> Any:
    """Import lm_eval, and turn off the process pool that it uses for standard errors.

    The pool is forked from a process with torch's threads, and may hang. The standard errors are
    the same without it.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    return import_optional(module, extra="eval", needed_by=needed_by)


def load_tasks(args: LMHarnessArgs) -> Any:
    """Return an lm_eval TaskManager whose `load` returns the loaded tasks of `args`."""
    manager = find_tasks(args)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in expand_names(args, manager):
        try:
            part = manager.load([spec])
        except Exception as error:  # from datasets, the network, or the task's code
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise UserError(
                f"harness.tasks: {_name(spec)} cannot be loaded: {type(error).__name__}: {reason}; "
                "to evaluate without a network, load it once with one (HF_HOME is the cache), or "
                "set harness.include_path to local tasks"
            ) from error
        for kind, entries in part.items():
            loaded[kind].update(entries)
    check_documents(args, loaded["tasks"])
    manager.load = lambda task_list: loaded
    return manager


def check_documents(args: LMHarnessArgs, loaded: Mapping[str, Any]) -> None:
    """Raise UserError for questions and few-shot examples that the tasks don't have."""
    for name, numbers in (args.samples or {}).items():
        if name not in loaded:
            raise UserError(
                f"harness.samples.{name}: no task of that name is evaluated; use one of "
                f"{', '.join(sorted(loaded))}"
            )
        size = len(loaded[name].eval_docs)
        wrong = [number for number in numbers if not 0 <= number < size]
        if wrong:
            raise UserError(
                f"harness.samples.{name}: no question {wrong[0]}; the task has questions 0 to "
                f"{size - 1}"
            )
    if not args.num_fewshot:
        return
    for name, task in loaded.items():
        size = len(list(task.fewshot_docs() or ()))
        config = task.config
        # The harness draws one more if the question itself may be among the examples.
        spare = int(config.fewshot_split is not None and config.fewshot_split == config.test_split)
        if args.num_fewshot + spare > size:
            raise UserError(
                f"harness.num_fewshot={args.num_fewshot}: {name} has {size} examples; use "
                f"{size - spare} or fewer"
            )


def find_tasks(args: LMHarnessArgs) -> Any:
    """Return a TaskManager that knows all names in `args.tasks`. Nothing is downloaded."""
    tasks = import_lm_eval("lm_eval.tasks")
    # Every rank would log the same.
    logging.getLogger("lm_eval").setLevel(args.verbosity if get_is_master() else "ERROR")
    options = {"include_path": args.include_path, "metadata": args.metadata}
    if args.include_path is not None:
        if not any(Path(args.include_path).rglob("*.yaml")):
            raise UserError(
                f"harness.include_path={args.include_path}: no *.yaml of a task found (cwd "
                f"{Path.cwd()})"
            )
        manager = tasks.TaskManager(include_defaults=False, **options)
        if not _unknown(args, manager):
            return manager
    manager = tasks.TaskManager(**options)
    if unknown := _unknown(args, manager):
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"e.g. {', '.join(EXAMPLES)}."
        raise UserError(
            f"harness.tasks: no task, group or tag {unknown[0]}; {hint} List all names with "
            "python -m apps.LT2.lm_eval ls tasks"
        )
    return manager


def expand_names(args: LMHarnessArgs, manager: Any) -> list[Any]:
    """Return the tasks of `args`, with each pattern replaced by the names that it matches."""
    specs: list[Any] = []
    for spec in args.tasks or []:
        matches = manager.match_tasks([spec]) if isinstance(spec, str) else []
        specs += [spec] if not matches or spec in matches else sorted(matches)
    return specs


def _unknown(args: LMHarnessArgs, manager: Any) -> list[str]:
    names = [_name(spec) for spec in args.tasks or [] if not _has_own_config(spec)]
    return [name for name in names if not manager.match_tasks([name])]


def _has_own_config(spec: Any) -> bool:
    if isinstance(spec, str):
        return Path(spec).suffix == ".yaml" and Path(spec).is_file()
    return "dataset_path" in spec or "custom_dataset" in spec or "group" in spec


def _name(spec: Any) -> str:
    return spec if isinstance(spec, str) else str(spec.get("task", spec.get("group", "a mapping")))
