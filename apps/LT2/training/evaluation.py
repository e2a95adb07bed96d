"""Evaluate during training: the validation loss of the model, and the harness on checkpoints.

The validation loss is measured on the model in training. The harness loads the checkpoint that was
just saved as a whole model, since the model in training is sharded, in fp32 and compiled for other
shapes. It runs inside training, or as a separate job: in SLURM, or on free GPUs of this machine. If
it fails, the error is logged and training continues.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from apps.LT2.evaluation.args import EvalArgs, parse_target
from apps.LT2.evaluation.evaluate import Part, evaluate, flatten_scores
from apps.LT2.evaluation.records import choose_folder, find_conditions
from apps.LT2.evaluation.scoring import EvaluationStopped
from apps.LT2.evaluation.validation import Validator, find_sources, format_validation
from apps.LT2.training.args import TrainArgs, find_free_gpus
from apps.LT2.training.trainer import Trainer
from lingua.args import dataclass_to_dict
from lingua.distributed import clean_env, get_dp_rank_and_degree, run_on_rank_0, run_together
from lingua.errors import UserError, is_machine_fault
from lingua.evaluations import ENDED_BY, EVAL_LOG, VALIDATION_LOG
from lingua.files.jsonl_log import is_recorded, repair_jsonl
from lingua.files.lock import check_unlocked
from lingua.logger import log_on_rank_0
from lingua.metrics import MetricLogger
from lingua.parallel.gradients import reshard
from lingua.rng import get_rng_state, set_rng_state
from lingua.slurm.background import GPUS_PER_NODE, failure, has_slurm
from lingua.slurm.script import SUBMIT_SCRIPT
from lingua.stool import StoolArgs, launch_in_background
from lingua.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

# stool's options that an evaluation job takes from the environment of this job.
SLURM_OPTIONS = {
    "partition": "SLURM_JOB_PARTITION",
    "account": "SLURM_JOB_ACCOUNT",
    "qos": "SLURM_JOB_QOS",
}


def metrics_path(args: TrainArgs) -> Path:
    return Path(args.dump_dir, "metrics.jsonl")


def build_run_validator(args: TrainArgs) -> Validator | None:
    """Build the validator of `eval.validation`, and read its text now: it may have mistakes."""
    validation = (args.eval or EvalArgs()).validation
    if validation is None:
        return None
    tokenizer = None
    if args.data.task is None:
        tokenizer = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path)
    validator = Validator(validation, args.data, tokenizer)
    run_together(lambda: validator.rows)
    return validator


@dataclass
class Evaluator:
    """Evaluates a run: the validation loss of its model, and the harness on its checkpoints.

    `should_stop` is called after each batch; if it is true on any rank, the evaluation stops and is
    repeated by `catch_up` of the resumed run. All methods are collectives.
    """

    trainer: Trainer
    metrics: MetricLogger
    validator: Validator | None
    should_stop: Callable[[], bool]
    jobs: dict[int, Any] = field(default_factory=dict)  # handles, by step
    has_reached_target: bool = False  # of eval.stop_at, at the current step

    def __post_init__(self) -> None:
        self.args = self.trainer.args
        self.harness = (self.args.eval or EvalArgs()).harness

    def catch_up(self) -> None:
        """Drop the scores of later steps, and run evaluations that a stop interrupted."""
        args, step = self.args, self.trainer.state.step
        run_on_rank_0(lambda: repair_jsonl(Path(args.dump_dir, VALIDATION_LOG), step))
        if run_on_rank_0(lambda: is_validation_missing(args, step)):
            self.log_validation_loss()
        self.has_reached_target = run_on_rank_0(lambda: has_reached_target(args, step))
        if self.harness is None:
            return
        if args.async_eval_gpus is None:
            run_on_rank_0(lambda: repair_jsonl(Path(args.dump_dir, EVAL_LOG), step))
        missing = run_on_rank_0(lambda: find_missing_harness_step(args, step))
        if missing is not None:
            self.run_harness(missing, run_on_rank_0(lambda: missing_parts(args, missing)))

    def log_validation_loss(self) -> None:
        """Measure and log the validation loss of the model in training."""
        if self.validator is None:
            return
        trainer = self.trainer
        rank, degree = get_dp_rank_and_degree(trainer.mesh)
        place = {"device": trainer.device, "rank": rank, "world_size": degree}
        scores: dict[str, float] = {}
        trained, counts = self.args.model.loop_count, (self.args.eval or EvalArgs()).loop_counts
        for loop_count in dict.fromkeys([trained, *(counts or [])]):
            options = {"loop_count": loop_count, "should_stop": self.should_stop}
            found = self.validator(trainer.model, **place, **options)
            if not found:  # stopped, or no text
                return
            scores |= found if loop_count == trained else {}
            if loop_count in (counts or []):
                scores |= {f"{name}/{loop_count}": value for name, value in found.items()}
        # Free the gathered weights. No backward does it here, and a replay of a CUDA graph does not
        # either, so the next validation could use them again.
        reshard(trainer.model)
        if scores:
            record = {"global_step": trainer.state.step, "acc_step": 0, **scores}
            stop_at = (self.args.eval or EvalArgs()).stop_at
            if stop_at is not None and parse_target(stop_at).is_met_by(scores):
                self.has_reached_target = True
                record[ENDED_BY] = f"eval.stop_at={stop_at}"
            self.metrics.log(record)
            log_on_rank_0("step %d  validation %s", trainer.state.step, format_validation(scores))
            if counts:
                losses = (f"{n}: {scores[f'loss/val/{n}']:.4f}" for n in dict.fromkeys(counts))
                log_on_rank_0("validation loss by loops  %s", ", ".join(losses))

    def run_harness(self, step: int, parts: list[Part] | None = None) -> None:
        """Run the harness on the checkpoint of `step`, or submit a job. Errors are logged.

        `parts` are the numbers of loops that are missing; null = all.
        """
        if self.harness is None:
            return
        try:
            parts = parts or eval_parts_of_step(self.args, step)
            if self.args.async_eval_gpus is not None:
                run_on_rank_0(lambda: self._submit(step, as_one_job(self.args, parts)))
            else:
                self._evaluate(parts)
        except Exception as error:
            logger.error(
                "the evaluation of step %d failed; to repeat it: python -m apps.LT2.eval "
                "ckpt_dir=%s ...\n%s",
                *(step, checkpoint_path(self.args, step), error),
                exc_info=not isinstance(error, UserError) and not is_machine_fault(error),
            )

    def _submit(self, step: int, args: EvalArgs) -> None:
        """Submit a job, and log which earlier jobs have failed."""
        for done in [earlier for earlier, job in self.jobs.items() if job.done()]:
            problem = failure(self.jobs.pop(done))
            if problem:
                logger.error("the evaluation job of step %d failed: %s", done, problem)
        self.jobs[step] = submit_evaluation(self.args, args)

    def _evaluate(self, parts: list[Part]) -> None:
        def try_to_evaluate() -> list[dict[str, Any]] | None:
            try:
                return evaluate(parts, self.should_stop)
            except EvaluationStopped:
                return None

        state = get_rng_state()  # the harness seeds every generator
        try:
            # A rank that fails must not leave the others waiting in the next collective.
            scores = run_together(try_to_evaluate)
        finally:
            set_rng_state(state)
            gc.collect()  # frees the second model; automatic collections are off in training
            torch.cuda.empty_cache()  # does nothing without CUDA
        if scores is None:
            logger.warning("a signal stopped the evaluation of step %s", parts[0][0].global_step)
            return
        for (args, conditions), of_part in zip(parts, scores, strict=True):
            flat = flatten_scores(of_part, conditions)
            self.metrics.send({"global_step": args.global_step, **flat})


# ---- missing evaluations


def is_evaluated(args: TrainArgs, step: int) -> bool:
    """Return whether the run evaluates at `step`."""
    return step > 0 and (step == args.steps or args.checkpoint.eval.fires(step))


def has_reached_target(args: TrainArgs, step: int) -> bool:
    """Return whether the validation at `step` has reached eval.stop_at."""
    stop_at = (args.eval or EvalArgs()).stop_at
    if stop_at is None:
        return False
    return is_recorded(metrics_path(args), step, accept=parse_target(stop_at).is_met_by)


def is_evaluation_missing(args: TrainArgs, step: int) -> bool:
    """Return whether the run that saved `step` stopped before it was evaluated."""
    return is_validation_missing(args, step) or find_missing_harness_step(args, step) is not None


def is_validation_missing(args: TrainArgs, step: int) -> bool:
    validation = (args.eval or EvalArgs()).validation
    if validation is None or not is_evaluated(args, step):
        return False
    has_text = args.data.task is not None or bool(find_sources(validation, args.data))
    return has_text and not is_recorded(metrics_path(args), step, "loss/val")


def find_missing_harness_step(args: TrainArgs, step: int) -> int | None:
    """Return the last evaluated step up to `step`, if it has a checkpoint and no scores."""
    every, harness = args.checkpoint.eval.every, (args.eval or EvalArgs()).harness
    last = step - step % every if every > 0 and step != args.steps else step
    has_weights = checkpoint_path(args, last).is_dir()
    if harness is None or not has_weights or not is_evaluated(args, last):
        return None
    missing = missing_parts(args, last)
    is_done = not missing
    if missing and args.async_eval_gpus is not None:
        is_done = has_job(Path(str(as_one_job(args, missing).dump_dir)))
    return None if is_done else last


def missing_parts(args: TrainArgs, step: int) -> list[Part]:
    """Return the parts of the harness's evaluation of `step` that have no record."""
    log = Path(args.dump_dir, EVAL_LOG)
    parts = eval_parts_of_step(args, step)
    return [part for part in parts if not is_recorded(log, step, accept=part[1].is_met_by)]


def has_job(folder: Path) -> bool:
    """Return whether a job that evaluates into `folder` may still end, in SLURM or here."""
    if has_slurm():  # it may be in the queue
        return (folder / SUBMIT_SCRIPT).exists()
    try:
        check_unlocked("dump_dir", folder)
    except UserError:
        return True
    return False


# ---- one evaluation


def checkpoint_path(args: TrainArgs, step: int) -> Path:
    return Path(str(args.checkpoint.path), f"{step:010d}")


def eval_parts_of_step(args: TrainArgs, step: int) -> list[Part]:
    """Return `eval:` for the checkpoint of `step`, with the harness only, and what it depends on.

    One part for each of `loop_counts`. The folders are not created.
    """
    given, checkpoint = args.eval or EvalArgs(), checkpoint_path(args, step)
    base = Path(args.dump_dir, given.name, checkpoint.name)
    given = replace(
        given,
        name=f"{args.name}_{given.name}_{step}",
        metric_log_dir=args.dump_dir,
        ckpt_dir=str(checkpoint),
        validation=None,
        stop_at=None,
        global_step=step,
    )
    parts = []
    for one in given.for_each_loop_count():
        conditions = find_conditions(one, checkpoint, dataclass_to_dict(args))
        folder, conditions = choose_folder(base, conditions)
        parts.append((replace(one, dump_dir=str(folder)), conditions))
    return parts


def as_one_job(args: TrainArgs, parts: list[Part]) -> EvalArgs:
    """Return the options of a job for all parts, which finds their folders from its dump_dir."""
    given = parts[0][0]
    if (args.eval or EvalArgs()).loop_counts is None:
        return given
    base = Path(str(given.dump_dir)).with_name(Path(given.ckpt_dir).name)
    counts = [one.loop_count for one, _ in parts if one.loop_count is not None]
    return replace(given, loop_count=None, loop_counts=counts, dump_dir=str(base))


def submit_evaluation(train_args: TrainArgs, args: EvalArgs) -> Any:
    """Start a job and return its handle. Call it on rank 0.

    The job runs in the SLURM partition of this job or, without SLURM, on free GPUs of this machine.
    """
    Path(str(args.dump_dir)).mkdir(parents=True, exist_ok=True)
    n_gpus, wandb = train_args.async_eval_gpus, train_args.logging.wandb
    assert n_gpus is not None
    if args.wandb is None and wandb is not None:
        args = replace(args, wandb=replace(wandb, id=None, resume=None, name=args.name))
    slurm = has_slurm()
    gpus = None if slurm else find_free_gpus(n_gpus)  # before clean_env hides the local world size
    nodes = count_nodes(n_gpus) if slurm else 1
    same_as_here: dict[str, Any] = {
        option: os.environ[name] for option, name in SLURM_OPTIONS.items() if os.environ.get(name)
    }
    given = StoolArgs(
        config=dataclass_to_dict(args),
        launcher="sbatch" if slurm else "bash",
        script="apps.LT2.eval",
        copy_code=False,
        dirs_exists_ok=True,
        nodes=nodes,
        ngpu=n_gpus // nodes,
        **same_as_here,
    )
    with clean_env():
        return launch_in_background(given, gpus=gpus)


def count_nodes(n_gpus: int) -> int:
    """Return the fewest nodes of at most eight GPUs that divide `n_gpus` evenly."""
    nodes = math.ceil(n_gpus / GPUS_PER_NODE)
    while n_gpus % nodes:
        nodes += 1
    return nodes
