"""Options of apps.LT2.eval, and of the section `eval:` of a training run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from apps.LT2.evaluation.validation import ValidationArgs
from apps.LT2.exits import check_exit
from apps.LT2.inference.generator import PackedCausalTransformerGeneratorArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.config.help import format_value
from lingua.errors import UserError
from lingua.metrics import WandbArgs

VERBOSITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass
class LMHarnessArgs:
    """Arguments of lm_eval.simple_evaluate under its own names, and the folder of local tasks."""

    # names of tasks, groups or tags, patterns such as arc_*, YAML files, or mappings with other
    # settings of a named one ({task: boolq, num_fewshot: 5}); required
    tasks: list[Any] | None = None
    include_path: str | None = None  # folder of local tasks
    metadata: dict[str, Any] = field(default_factory=dict)  # passed to tasks that build their data
    num_fewshot: int | None = None  # examples in the prompt; null = the task's default
    limit: float | None = None  # questions of each task; below 1 a fraction of them; null = all
    samples: dict[str, list[int]] | None = None  # task -> indices of its questions; null = all
    stride: int | None = None  # tokens between rolling windows; null = the window's length
    use_cache: str | None = None  # file of cached answers, one process only; null = no cache
    cache_requests: bool = False  # cache the prompts for the next evaluation
    rewrite_requests_cache: bool = False  # rebuild the cached prompts
    delete_requests_cache: bool = False  # delete the cached prompts first
    bootstrap_iters: int = 100_000  # resamples for standard errors; 0 = no standard errors
    write_out: bool = False  # print the first prompts
    log_samples: bool = True  # save every question with its answer
    predict_only: bool = False  # save the answers and compute no metrics
    system_instruction: str | None = None  # text before each prompt
    apply_chat_template: bool = False  # format prompts with the tokenizer's chat template
    fewshot_as_multiturn: bool = False  # each few-shot example is a turn of the conversation
    gen_kwargs: dict[str, Any] | None = None  # generation settings that override the tasks'
    verbosity: str = "INFO"  # log level of the harness
    confirm_run_unsafe_code: bool = False  # allow tasks that run code written by the model
    random_seed: int = 0  # of Python
    numpy_random_seed: int = 1234  # of NumPy
    torch_random_seed: int = 1234  # of PyTorch
    fewshot_random_seed: int = 1234  # of the few-shot examples

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError(
                "harness.tasks is empty: name tasks, e.g. harness.tasks=[hellaswag], or set "
                "harness=null"
            )
        for task in self.tasks:
            name = task_name(task)
            is_named = isinstance(name, str) and name.strip() != ""
            _require(is_named, "tasks", task, "a name, or a mapping such as {task: boolq}")
        is_limit = self.limit is None or 0 < self.limit < 1 or self.limit == int(self.limit) > 0
        _require(is_limit, "limit", self.limit, "a number of questions, a fraction, or null")
        if self.limit is not None and self.samples is not None:
            raise UserError(f"harness.limit={self.limit}: harness.samples is set too; use only one")
        for task, numbers in (self.samples or {}).items():
            _require(bool(numbers), f"samples.{task}", numbers, "numbers of questions, e.g. [0, 1]")
        for name in ("bootstrap_iters", "num_fewshot"):
            _require((getattr(self, name) or 0) >= 0, name, getattr(self, name), "0 or more")
        _require(self.stride is None or self.stride >= 1, "stride", self.stride, "1 or more")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise UserError(
                "harness.fewshot_as_multiturn=true needs harness.apply_chat_template=true"
            )
        levels = ", ".join(VERBOSITIES)
        _require(self.verbosity in VERBOSITIES, "verbosity", self.verbosity, f"one of {levels}")


def task_name(spec: Any) -> Any:
    """Return the name in an entry of `harness.tasks`, or what is in its place."""
    return spec.get("group", spec.get("task")) if isinstance(spec, dict) else spec


def check_stride(stride: int | None, window: int) -> None:
    if stride is not None and not 1 <= stride <= window:
        raise UserError(
            f"harness.stride={stride} must be 1 to the {window} tokens of a window, or null for "
            "windows without overlap"
        )


def _require(condition: bool, option: str, value: Any, wanted: str) -> None:
    if not condition:
        raise UserError(f"harness.{option}={format_value(value)} must be {wanted}")


@dataclass
class EvalArgs:
    POSITIONAL: ClassVar = "ckpt_dir"
    ALIASES: ClassVar = {"ckpt": "ckpt_dir"}

    name: str = "evals"  # of the job; in training also of the folder of results
    # folder for results.json and validation.json; null = evals/<step> in the run's folder
    dump_dir: str | None = None
    # folder of metrics.eval.jsonl and metrics.validation.jsonl; null = dump_dir if set, else the
    # run's folder
    metric_log_dir: str | None = None
    ckpt_dir: str = ""  # a run's folder (newest checkpoint), a step folder or a file of weights
    generator: PackedCausalTransformerGeneratorArgs = field(
        default_factory=PackedCausalTransformerGeneratorArgs
    )
    harness: LMHarnessArgs | None = None  # LM-Evaluation-Harness; null = not run
    # loss on held-out text; null = not measured
    validation: ValidationArgs | None = field(default_factory=ValidationArgs)
    wandb: WandbArgs | None = None  # also send the scores to wandb
    global_step: int | None = None  # step to record with the scores; null = the checkpoint's
    loop_count: int | None = None  # number of loops; null = as in training
    # evaluate with each of these numbers of loops, e.g. [1, 2, 4]; in training validation also has
    # loop_count loops; null = once, with loop_count
    loop_counts: list[int] | None = None
    # leave the loops early, by a rule of generate: 2 | gate:0.8 | kl:0.005; null = generator.exit
    exit: str | None = None
    # in training: end the run when its validation reaches this, e.g. "acc/val>=0.9"; null = train
    # all steps
    stop_at: str | None = None
    tokenizer_path: str | None = None  # path of the tokenizer's file; null = as in training

    def __post_init__(self) -> None:
        if self.exit is not None:
            self.generator = replace(self.generator, exit=self.exit)
        if self.stop_at is not None:
            parse_target(self.stop_at)
        if self.loop_counts is None:
            return
        given = f"loop_counts={format_value(self.loop_counts)}"
        if self.loop_count is not None:
            raise UserError(f"loop_count={self.loop_count} and {given}: set only one of them")
        if not self.loop_counts:
            raise UserError(f"{given} must be numbers of loops, e.g. [1, 2, 4], or null")

    def for_each_loop_count(self) -> list[EvalArgs]:
        """Return one evaluation for each of `loop_counts`, or this one if they are null."""
        if self.loop_counts is None:
            return [self]
        counts = dict.fromkeys(self.loop_counts)
        return [replace(self, loop_count=n, loop_counts=None) for n in counts]


@dataclass(frozen=True)
class Target:
    """A value that a metric of the validation reaches from below, or from above."""

    metric: str
    rises: bool
    value: float

    def is_met_by(self, scores: Mapping[str, Any]) -> bool:
        found = scores.get(self.metric)
        if found is None:  # or NaN in a file of metrics
            return False
        return found >= self.value if self.rises else found <= self.value


def parse_target(text: str) -> Target:
    """Parse `stop_at`. UserError unless it compares a metric with a number."""
    found = re.fullmatch(r"\s*([\w/]+)\s*(>=|<=)\s*(\S+)\s*", text)
    try:
        value = float(found[3]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise UserError(
            f"stop_at={text} must compare a metric, e.g. 'acc/val>=0.9' or 'loss/val<=2.5'"
        )
    return Target(found[1], found[2] == ">=", value)


def check_loop_counts(args: EvalArgs, model: LoopedTransformerArgs, section: str = "") -> None:
    """Raise UserError for numbers of loops, or an exit, that the model doesn't allow."""
    for loop_count in args.loop_counts or []:
        try:
            model.layout_of(loop_count)
        except UserError as error:
            given = f"{section}loop_counts={format_value(args.loop_counts)}"
            raise UserError(f"{given}: {error}") from None
    for loop_count in args.loop_counts or [args.loop_count or model.loop_count]:
        try:
            check_exit(args.generator.exit, model, loop_count)
        except UserError as error:
            raise UserError(f"{section}{error}") from None
