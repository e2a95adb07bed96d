"""Name in every record what changes a score, and choose the folder of the results.

Results with the run's own options are in evals/<step>/, others in evals/<step>-<option>=<value>/.
A run's own options are its loop_count and tokenizer in training, and its section `eval:` or the
defaults. A result never replaces a result with other options. Records contain

    made_with           every option that changes a score, the checkpoint, and the code version
    differs_from_run    the options that are not the run's own

Records skip options that only change speed and rounding, such as the batch size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apps.LT2.evaluation.args import EvalArgs, LMHarnessArgs, task_name
from apps.LT2.evaluation.validation import ValidationArgs, task_of
from apps.LT2.inference.load import resolve_device
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.args import dataclass_from_dict
from lingua.config.help import format_value
from lingua.dataloader.args import DataArgs
from lingua.dataloader.synthetic.args import build_task, options_of
from lingua.errors import UserError
from lingua.evaluations import DIFFERS, MADE_WITH, label_of
from lingua.parallel.args import DTYPES, resolve_dtype
from lingua.slurm.code import find_code_version

logger = logging.getLogger(__name__)

Options = dict[str, Any]  # by dotted name

RESULTS, VALIDATION = "results.json", "validation.json"
OF_SECTIONS = {RESULTS: ("harness.", "generator."), VALIDATION: ("validation.",)}
WITHOUT_EFFECT = {  # on scores, except for rounding
    "generator.compile_decoding",
    "generator.compile_prefilling",
    "generator.device",
    "generator.dtype",  # recorded as `dtype`, with `auto` resolved
    "generator.exit",  # recorded as `exit`
    "generator.max_tokens",
    "generator.reduce_generation_overhead",
    "generator.show_progress",
    "harness.cache_requests",
    "harness.confirm_run_unsafe_code",
    "harness.delete_requests_cache",
    "harness.log_samples",
    "harness.rewrite_requests_cache",
    "harness.use_cache",
    "harness.verbosity",
    "harness.write_out",
}
PATHS = {"tokenizer_path", "harness.include_path", "validation.root_dir"}


@dataclass(frozen=True)
class Conditions:
    """The options and checkpoint of a result."""

    checkpoint: str
    options: Options
    differing: Options  # from the run's own

    def record(self, file: str) -> dict[str, Any]:
        """Return the fields of a record that describe how the scores in `file` were made."""
        made_with = {
            "checkpoint": self.checkpoint,
            **self.of_file(file),
            "code_version": find_code_version(Path(__file__).resolve().parents[3]),
        }
        if file == RESULTS:
            made_with["lm_eval"] = importlib.metadata.version("lm_eval")
        return {MADE_WITH: made_with, DIFFERS: self.differing_of(file)}

    def differing_of(self, file: str) -> Options:
        return {o: v for o, v in self.differing.items() if o in self.of_file(file)}

    def digest(self, *, of_model: bool) -> str:
        """Return a short hash of what a cached prompt depends on, or a cached answer (of_model)."""
        options = {o: v for o, v in self.options.items() if of_model or o.startswith("harness.")}
        source = Path(self.checkpoint)
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        weights = [self.checkpoint, *(file.stat().st_mtime_ns for file in files)]
        text = json.dumps([options, weights if of_model else None], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def of_file(self, file: str) -> Options:
        """Return the options that change the results in `file`."""
        others = [p for name, prefixes in OF_SECTIONS.items() if name != file for p in prefixes]
        return {o: v for o, v in self.options.items() if not o.startswith(tuple(others))}

    def files(self) -> list[str]:
        """Return the names of the files that the results are written to."""
        return [
            file
            for file, prefixes in OF_SECTIONS.items()
            if any(o.startswith(prefixes) for o in self.options)
        ]

    def is_met_by(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record of the harness has these options, or names none (older)."""
        return not differences(record.get(MADE_WITH, {}), self.of_file(RESULTS))


def find_conditions(args: EvalArgs, source: Path, config: Mapping[str, Any]) -> Conditions:
    """Compare `args` with the run's own options in the config of its training."""
    device = args.generator.device
    given = score_options(args, config)
    own = score_options(own_args(args, config, device), config)
    differing = {option: value for option, value in given.items() if own.get(option) != value}
    return Conditions(os.path.abspath(source), given, differing)


def own_args(args: EvalArgs, config: Mapping[str, Any], device: str) -> EvalArgs:
    """Return the arguments that evaluate the run with its own options, in the parts of `args`.

    If the run has no `eval.harness`, the choice of tasks in `args` counts as its own, but not other
    settings of these tasks.
    """
    try:
        own = dataclass_from_dict(EvalArgs, config.get("eval") or {}, strict=False)
    except UserError as error:
        logger.warning("eval: of the checkpoint's config is not readable: %s", error)
        own = EvalArgs()
    harness, generator, validation = own.harness, own.generator, own.validation
    if args.harness is None:
        harness = None
    elif harness is None:
        chosen = ("tasks", "include_path", "metadata", "bootstrap_iters")
        harness = LMHarnessArgs(**{name: getattr(args.harness, name) for name in chosen})
        harness.tasks = [task_name(task) for task in harness.tasks or []]
        # max_tokens must be above max_gen_len, and does not count
        generator = replace(generator, max_gen_len=args.generator.max_gen_len, max_tokens=2**62)
    if args.validation is None:
        validation = None
    elif validation is None:
        validation = ValidationArgs()
    return EvalArgs(
        generator=replace(generator, device=device), harness=harness, validation=validation
    )


def score_options(args: EvalArgs, config: Mapping[str, Any]) -> Options:
    """Return every option that changes a score, by dotted name, in one form for equal values."""
    dtype = resolve_dtype(args.generator.dtype, resolve_device(args.generator.device).type)
    trained = config["model"].get("loop_count", LoopedTransformerArgs.loop_count)
    options: Options = {
        "loop_count": trained if args.loop_count is None else args.loop_count,
        "exit": args.generator.exit,
        "dtype": next(name for name, value in DTYPES.items() if value is dtype),
        "tokenizer_path": args.tokenizer_path or config["data"]["tokenizer"].get("path"),
    }
    sections = {"harness": args.harness, "validation": args.validation}
    if args.harness is not None:
        sections["generator"] = args.generator
    for section, values in sections.items():
        if values is not None:
            for field in dataclasses.fields(values):
                options[f"{section}.{field.name}"] = getattr(values, field.name)
    if options.pop("validation.task", None) is not None or config["data"].get("task"):
        options |= _task_options(args, config)
    for option in WITHOUT_EFFECT & options.keys():
        del options[option]
    for option in PATHS & options.keys():
        options[option] = options[option] and os.path.abspath(options[option])
    if "harness.tasks" in options:
        tasks = [task_name(t) if len(t) == 1 else t for t in options["harness.tasks"]]
        options["harness.tasks"] = sorted(tasks, key=format_value)
    return {option: _canonical(value) for option, value in options.items()}


def _task_options(args: EvalArgs, config: Mapping[str, Any]) -> Options:
    if args.validation is None:
        return {}
    task = task_of(args.validation, dataclass_from_dict(DataArgs, config["data"], strict=False))
    found = {} if task is None else options_of(build_task(task))
    return {f"validation.task.{name}": value for name, value in found.items()}


def _canonical(value: Any) -> Any:
    """Return 4 for 4.0, also inside containers."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ---- folders


def choose_folder(base: Path, conditions: Conditions) -> tuple[Path, Conditions]:
    """Return `base`, or a sibling folder whose name lists the differing options.

    If it holds a result with other options, these are added to the name: two task lists may both
    count as the run's own.
    """
    while True:
        differing = conditions.differing
        folder = base.with_name(f"{base.name}-{label_of(differing)}") if differing else base
        others = conflicts(folder, conditions)
        if not others:
            return folder, conditions
        if others.keys() <= differing.keys():
            raise UserError(f"{folder} holds a result with {_listed(others)}; move it away")
        named = {o: v for o, v in conditions.options.items() if o in differing or o in others}
        conditions = replace(conditions, differing=named)


def conflicts(folder: Path, conditions: Conditions) -> Options:
    """Return the options of earlier results in the files to be written that differ."""
    found: Options = {}
    for file in conditions.files():
        found |= differences(read_made_with(folder / file) or {}, conditions.of_file(file))
    return found


def differences(made_with: Mapping[str, Any], wanted: Options) -> Options:
    """Return the options of an earlier result that differ from `wanted`."""
    if made_with:
        made_with = {"exit": "none", **made_with}  # older results have no exit
    return {o: made_with[o] for o, v in wanted.items() if o in made_with and made_with[o] != v}


def read_made_with(file: Path) -> Options | None:
    """Return the options recorded in a result. None if the file or its options are missing."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))[MADE_WITH]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_way(file: Path, conditions: Conditions) -> None:
    """Prepare to write `file`: rename a result with other options, or of an older version."""
    if not file.exists():
        return
    made_with = read_made_with(file)
    wanted = conditions.of_file(file.name) | {"checkpoint": conditions.checkpoint}
    others = differences(made_with or {}, wanted)
    if made_with is not None and not others:
        logger.info("%s is replaced: it has the same options", file)
        return
    names = (file.with_name(f"{file.stem}.old-{n}{file.suffix}") for n in itertools.count(1))
    old = next(name for name in names if not name.exists())
    file.rename(old)
    why = f"has {_listed(others)}" if others else "doesn't name its options"
    logger.warning("the earlier %s %s; it is now %s", file, why, old.name)


def _listed(options: Options) -> str:
    return ", ".join(f"{option}={format_value(value)}" for option, value in options.items())
