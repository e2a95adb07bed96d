"""What an evaluation can be told: apps.LT2.eval, and the section `eval:` of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apps.LT2.evaluation.validation import ValidationArgs
from apps.LT2.inference.generator import PackedCausalTransformerGeneratorArgs
from lingua.errors import UserError
from lingua.metrics import WandbArgs

VERBOSITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass
class LMHarnessArgs:
    """Arguments of lm_eval.simple_evaluate, by its names, and where local tasks lie."""

    # names of tasks, groups or tags, patterns such as arc_*, YAML files, or mappings that change a
    # task ({task: boolq, num_fewshot: 5}); required
    tasks: list[Any] | None = None
    include_path: str | None = None  # folder with tasks of one's own
    metadata: dict[str, Any] = field(default_factory=dict)  # passed to tasks that make their data
    num_fewshot: int | None = None  # examples in the prompt; null = as each task says
    limit: float | None = None  # questions of each task; below 1 a share of them; null = all
    samples: dict[str, list[int]] | None = None  # task -> its questions by number; null = all
    stride: int | None = None  # tokens that a rolling window moves on; null = its whole length
    use_cache: str | None = None  # file of answers to use again, of one process; null = none
    cache_requests: bool = False  # keep the prompts that were built, for the next evaluation
    rewrite_requests_cache: bool = False  # build them again
    delete_requests_cache: bool = False  # delete them all first
    bootstrap_iters: int = 100_000  # resamples behind standard errors; 0 = no standard errors
    write_out: bool = False  # print the first prompts
    log_samples: bool = True  # keep every question with its answer
    predict_only: bool = False  # keep the answers and measure nothing
    system_instruction: str | None = None  # text before each prompt
    apply_chat_template: bool = False  # write prompts as conversations, in the tokenizer's template
    fewshot_as_multiturn: bool = False  # examples are turns of their own in the conversation
    gen_kwargs: dict[str, Any] | None = None  # generation settings that win over the tasks' own
    verbosity: str = "INFO"  # of the harness's own log
    confirm_run_unsafe_code: bool = False  # allow tasks that run what the model wrote
    random_seed: int = 0  # of Python's generator
    numpy_random_seed: int = 1234  # of NumPy's
    torch_random_seed: int = 1234  # of PyTorch's
    fewshot_random_seed: int = 1234  # of the choice of examples

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError(
                "harness.tasks is empty: name tasks, e.g. harness.tasks=[hellaswag], or leave the "
                "harness out with harness=null"
            )
        for task in self.tasks:
            if not isinstance(task, str | dict):
                raise UserError(f"harness.tasks: {task!r} is neither a name nor a mapping")
        if self.limit is not None and not (0 < self.limit < 1 or self.limit == int(self.limit) > 0):
            raise UserError(
                f"harness.limit={self.limit} must be a number of questions, a share below 1, or "
                "null for all"
            )
        if self.limit is not None and self.samples is not None:
            raise UserError(f"harness.limit={self.limit}: harness.samples is set, too; keep one")
        if self.stride is not None and self.stride < 1:
            raise UserError(f"harness.stride={self.stride} must be at least 1 token, or null")
        if self.bootstrap_iters < 0:
            raise UserError(f"harness.bootstrap_iters={self.bootstrap_iters} must be 0 or more")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"harness.num_fewshot={self.num_fewshot} must be 0 or more, or null")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise UserError(
                "harness.fewshot_as_multiturn=true needs harness.apply_chat_template=true: only a "
                "conversation has turns"
            )
        for name in ("random", "numpy_random", "torch_random", "fewshot_random"):
            seed = getattr(self, f"{name}_seed")
            if not 0 <= seed < 2**32:  # the narrowest of them, NumPy's
                raise UserError(f"harness.{name}_seed={seed} must be from 0 to 2**32 - 1")
        if self.verbosity not in VERBOSITIES:
            raise UserError(
                f"harness.verbosity={self.verbosity} must be one of {', '.join(VERBOSITIES)}"
            )


@dataclass
class EvalArgs:
    name: str = "evals"  # of the job; in training also of the folder that results go to
    # folder for results.json and validation.json; null = evals/<step> in the run's folder
    dump_dir: str | None = None
    # folder whose metrics.eval.jsonl and metrics.validation.jsonl get a line; null = the run's
    # folder, or dump_dir where that is set
    metric_log_dir: str | None = None
    ckpt_dir: str = ""  # a run's folder (newest checkpoint), a step folder or a file of weights
    generator: PackedCausalTransformerGeneratorArgs = field(
        default_factory=PackedCausalTransformerGeneratorArgs
    )
    harness: LMHarnessArgs | None = None  # LM-Evaluation-Harness; null = not run
    # loss on held-out text; null = not measured
    validation: ValidationArgs | None = field(default_factory=ValidationArgs)
    wandb: WandbArgs | None = None  # send the scores there, too
    global_step: int | None = None  # step that the scores belong to; null = the checkpoint's
    loop_count: int | None = None  # run the stack this often; null = as in training
    tokenizer_path: str | None = None  # where the tokenizer's file lies now; null = as in training
