"""Find the tasks of the LM-Evaluation-Harness by name, load them with their data, and check them.

An entry of `harness.tasks` is a name, a pattern, a YAML file or a mapping. A mapping whose `task`
or `group` is a known name is that task or group with other settings; any other is a whole new task.
Everything that can be known about a task is checked before scoring: see `check_tasks`. If all tasks
are in `harness.include_path`, the 14,000 tasks of the harness are not listed.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from apps.LT2.evaluation.args import LMHarnessArgs, task_name
from apps.LT2.evaluation.chat import find_chat_template
from apps.LT2.inference.generator import PackedCausalTransformerGeneratorArgs
from lingua.config.help import format_value
from lingua.errors import UserError, first_line, import_optional
from lingua.parallel.ranks import get_is_master
from lingua.tokenizer import TokenizerArgs

EXAMPLES = ("hellaswag", "arc_easy", "piqa")
# Errors of packages that have no common class: requests, httpx, huggingface_hub, urllib.
CONNECTION_ERRORS = {
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ReadTimeout",
    "Timeout",
    "URLError",
}
OFFLINE = (
    "to evaluate without a network, load the data once with one (HF_HOME is the cache), or use "
    "local tasks"
)


def import_lm_eval(module: str = "lm_eval", *, needed_by: str = "harness.tasks") -> Any:
    """Import lm_eval, and turn off the process pool that it uses for standard errors.

    The pool is forked from a process with torch's threads, and may hang. The standard errors are
    the same without it.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    return import_optional(module, extra="eval", needed_by=needed_by)


def load_tasks(
    args: LMHarnessArgs,
    generator: PackedCausalTransformerGeneratorArgs,
    tokenizer: TokenizerArgs,
    window: int,
) -> Any:
    """Return an lm_eval TaskManager whose `load` returns the loaded and checked tasks of `args`.

    Tasks that build their data also get the tokenizer, and `window`, the tokens of a prompt.
    The tasks have their number of few-shot examples: that of their mapping, else of `args`, else
    their own. UserError for everything about the tasks that is wrong.
    """
    context = {"lt2_tokenizer": [tokenizer.name, tokenizer.path], "lt2_window": window}
    manager = find_tasks(args, context)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    specs: dict[str, Any] = {}  # task to the mapping or name that it comes from
    for spec in expand_names(args, manager):
        part = _load(spec, manager)
        for name, task in part["tasks"].items():
            settings = _settings(spec)
            if name in specs and _settings(specs[name]) != settings:
                raise UserError(
                    f"harness.tasks: {name} is given twice with different settings "
                    f"({format_value(specs[name])}, {format_value(spec)}), and would have one "
                    "result; evaluate them one at a time"
                )
            specs[name] = spec
            wanted = settings.get("num_fewshot")
            # 0 examples in a task's own config are final, as in the harness.
            if wanted is None and task.get_config("num_fewshot") != 0:
                wanted = args.num_fewshot
            if wanted is not None:
                task.set_config("num_fewshot", wanted)
        for kind, entries in part.items():
            loaded[kind].update(entries)
    if not loaded["tasks"]:
        raise UserError(
            f"harness.tasks={format_value(args.tasks)}: no tasks specified, or none found"
        )
    check_tasks(args, loaded["tasks"], generator, tokenizer)
    manager.load = lambda task_list: loaded
    return manager


def _load(spec: Any, manager: Any) -> dict[str, Any]:
    spec = copy.deepcopy(spec)  # the harness adds its defaults to mappings
    try:
        if _is_group(spec):
            return manager.load([_build_group(spec, manager)])
        if not _overrides_known(spec, manager):
            return manager.load([spec])
        # Only members of a group may have other settings than the task, group or tag of that name.
        members = {"group": "members", "task": list(_as_members(spec, manager))}
        part = manager.load([_build_group(members, manager)])
    except Exception as error:  # from datasets, the network, or the task's code
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = f"{kind}{first_line(error)}"
        advice = f"; {OFFLINE}" if is_connection_error(error) else ""
        raise UserError(
            f"harness.tasks: {task_name(spec)} cannot be loaded: {reason}{advice}"
        ) from error
    for kind in ("groups", "group_map"):
        del part[kind]["members"]
    return part


def _build_group(spec: Mapping[str, Any], manager: Any) -> Any:
    """Build a new group. From a mapping, `manager.load` gives its settings to each member."""
    return manager._factory._build_group(spec["group"], spec, None, manager.task_index)


def _as_members(spec: Mapping[str, Any], manager: Any) -> Iterator[dict[str, Any]]:
    name, settings = task_name(spec), _settings(spec)
    if name in manager.all_groups:
        yield {"group": name, **settings}
    elif name in manager.all_tags:  # the harness would give all its tasks the name of the tag
        yield from ({"task": t, **settings} for t in sorted(manager.task_index[name].tags))
    else:
        yield {"task": name, **settings}


def is_connection_error(error: BaseException | None) -> bool:
    """Return whether the error, or one that caused it, comes from the network."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if isinstance(error, TimeoutError | socket.gaierror) or names & CONNECTION_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False


def use_cache_without_network() -> None:
    """Turn on the Hub's offline mode if its name can't be resolved: it would retry for 23 s."""
    from datasets import config
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if getproxies():  # the proxy resolves names
        return
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True


# ---- names


def find_tasks(args: LMHarnessArgs, context: Mapping[str, Any] | None = None) -> Any:
    """Return a TaskManager that knows all names in `args.tasks`. Nothing is downloaded.

    `context` is passed to tasks, beside `args.metadata`.
    """
    tasks = import_lm_eval("lm_eval.tasks")
    # Every rank would log the same.
    logging.getLogger("lm_eval").setLevel(args.verbosity if get_is_master() else "ERROR")
    options = {"include_path": args.include_path, "metadata": {**(context or {}), **args.metadata}}
    if args.include_path is not None:
        if not any(Path(args.include_path).rglob("*.yaml")):
            raise UserError(
                f"harness.include_path={args.include_path}: no *.yaml of a task found (cwd "
                f"{Path.cwd()})"
            )
        manager = tasks.TaskManager(include_defaults=False, **options)
        if not _unknown(args, manager):
            check_mappings(args, manager)
            return manager
    use_cache_without_network()
    manager = tasks.TaskManager(**options)
    if unknown := _unknown(args, manager):
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"e.g. {', '.join(EXAMPLES)}."
        raise UserError(
            f"harness.tasks: no task, group or tag {format_value(unknown[0])}; {hint} List all "
            "names with python -m apps.LT2.lm_eval ls tasks"
        )
    check_mappings(args, manager)
    return manager


def check_mappings(args: LMHarnessArgs, manager: Any) -> None:
    """Raise UserError for settings in mappings that tasks don't have."""
    config = import_lm_eval("lm_eval.config.task")
    for spec in args.tasks or []:
        if not _overrides_known(spec, manager):
            continue
        # Tasks written in Python ignore what they are given.
        is_python = "class" in (manager.task_index[task_name(spec)].cfg or {})
        known = {f.name for f in fields(config.TaskConfig)} if not is_python else {"num_fewshot"}
        for name, value in _settings(spec).items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
                )
                raise UserError(f"harness.tasks: {task_name(spec)}: no setting {name}; {hint}")
            if name == "num_fewshot" and (type(value) is not int or value < 0):
                shown = format_value(value)
                raise UserError(
                    f"harness.tasks: {task_name(spec)}: num_fewshot={shown} must be 0 or more"
                )


def expand_names(args: LMHarnessArgs, manager: Any) -> list[Any]:
    """Return the tasks of `args`, with each pattern replaced by the names that it matches."""
    specs: list[Any] = []
    for spec in args.tasks or []:
        matches = manager.match_tasks([spec]) if isinstance(spec, str) else []
        specs += [spec] if not matches or spec in matches else sorted(matches)
    return specs


def _unknown(args: LMHarnessArgs, manager: Any) -> list[str]:
    names = [task_name(spec) for spec in args.tasks or [] if not _has_own_config(spec)]
    return [name for name in names if not manager.match_tasks([name])]


def _has_own_config(spec: Any) -> bool:
    if isinstance(spec, str):
        return Path(spec).suffix == ".yaml" and Path(spec).is_file()
    return "dataset_path" in spec or "custom_dataset" in spec or _is_group(spec)


def _is_group(spec: Any) -> bool:
    """Return whether a mapping is a new group: {group: mine, task: [boolq, piqa]}."""
    return isinstance(spec, Mapping) and isinstance(spec.get("task"), list)


def _overrides_known(spec: Any, manager: Any) -> bool:
    """Return whether a mapping changes settings of a known task, group or tag."""
    is_single = isinstance(spec, Mapping) and not _is_group(spec)
    return is_single and task_name(spec) in manager.all_tasks


def _settings(spec: Any) -> dict[str, Any]:
    given = spec if isinstance(spec, Mapping) else {}
    return {k: v for k, v in given.items() if k not in ("task", "group")}


# ---- checks before scoring


def check_tasks(
    args: LMHarnessArgs,
    tasks: Mapping[str, Any],
    generator: PackedCausalTransformerGeneratorArgs,
    tokenizer: TokenizerArgs,
) -> None:
    """Raise a UserError that names the task if it cannot be evaluated with these options.

    Builds the requests of each task's first question, checks their generation settings, and scores
    the right answer with the task's own functions.
    """
    check_samples(args, tasks)
    template = find_chat_template(tokenizer).render if args.apply_chat_template else None
    chat = {
        "apply_chat_template": args.apply_chat_template,
        "chat_template": template
        and (
            lambda messages, add_generation_prompt=True: template(messages, add_generation_prompt)
        ),
    }
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not args.confirm_run_unsafe_code:
            raise UserError(
                f"harness.tasks: {name} runs code that the model writes; allow it with "
                "harness.confirm_run_unsafe_code=true"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"harness.tasks: {name} needs images or audio; LT2 models read text")
        check_fewshot(args, name, task)
        try:
            check_first_question(args, task, generator, chat)
        except UserError as error:
            raise UserError(f"harness.tasks: {name}: {error}") from None
        except Exception as error:  # from the task's templates and functions
            raise UserError(
                f"harness.tasks: {name} cannot be evaluated: its first question fails with "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error


def check_samples(args: LMHarnessArgs, tasks: Mapping[str, Any]) -> None:
    for name, numbers in (args.samples or {}).items():
        if name not in tasks:
            raise UserError(
                f"harness.samples.{name}: no task of that name is evaluated; use one of "
                f"{', '.join(sorted(tasks))}"
            )
        size = len(tasks[name].eval_docs)
        wrong = [number for number in numbers if not 0 <= number < size]
        if wrong:
            raise UserError(
                f"harness.samples.{name}: no question {wrong[0]}; the task has questions 0 to "
                f"{size - 1}"
            )


def check_fewshot(args: LMHarnessArgs, name: str, task: Any) -> None:
    """Raise UserError if the task has fewer examples than its prompts need."""
    wanted, config = task.get_config("num_fewshot"), task.config
    if not wanted:
        return
    size = len(list(task.fewshot_docs() or ()))
    # The harness draws one more if the question itself may be among the examples.
    spare = int(config.fewshot_split is not None and config.fewshot_split == config.test_split)
    if wanted + spare > size:
        option = f"num_fewshot={wanted}"
        where = (
            f"{option}: {name}" if args.num_fewshot == wanted else f"tasks: {name}: {option}: it"
        )
        raise UserError(f"harness.{where} has {size} examples; use {max(size - spare, 0)} or fewer")


def check_first_question(
    args: LMHarnessArgs,
    task: Any,
    generator: PackedCausalTransformerGeneratorArgs,
    chat: Mapping[str, Any],
) -> None:
    """Build the requests of a task's first question, as the harness does, and score answers."""
    from apps.LT2.evaluation.harness import generation_settings  # imports lm_eval

    doc, repeats = task.eval_docs[0], getattr(task.config, "repeats", 1)
    task.set_fewshot_seed(args.fewshot_random_seed)
    context = task.fewshot_context(
        doc,
        num_fewshot=task.get_config("num_fewshot") or 0,
        system_instruction=args.system_instruction,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        gen_prefix=task.doc_to_prefix(doc),
        **chat,
    )
    metadata = (task.config.task, 0, repeats)
    requests = task.construct_requests(doc=doc, ctx=context, metadata=metadata, **chat)
    requests = requests if isinstance(requests, list) else [requests]
    for request in requests:
        answer: Any = (-1.0, False)
        if request.request_type == "loglikelihood_rolling":
            answer = -1.0
        elif request.request_type == "generate_until":
            generation_settings({**request.args[1], **(args.gen_kwargs or {})}, generator)
            target = task.doc_to_target(doc)
            answer = str(target[0] if isinstance(target, list) and target else target)
        request.resps.extend([answer] * repeats)
    if args.predict_only or getattr(task, "UNSAFE_CODE", False):
        return
    task._instances = requests
    task.apply_filters()
    for name in requests[0].filtered_resps:
        task.process_results(doc, [request.filtered_resps[name] for request in requests])
    task._instances = None
