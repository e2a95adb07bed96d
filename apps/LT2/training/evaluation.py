"""Evaluation of a run's own checkpoints by the harness: inside training, or in a job of its own.

A job goes through submitit: to SLURM, or to GPUs of this machine that training does not use.
Inside, the checkpoint that was just saved is loaded again as a whole model on each rank: the model
in training is sharded, in fp32, and compiled for other shapes. An evaluation that fails is told of
in the log and training goes on; mistakes in `eval:` are refused at the start. The validation loss
is no part of this: training measures it on its own model.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.evaluation.evaluate import evaluate, flatten_scores
from apps.LT2.evaluation.scoring import EvaluationStopped
from apps.LT2.evaluation.validation import Validator, find_sources
from apps.LT2.training.args import TrainArgs, free_gpus
from apps.LT2.training.trainer import Trainer
from lingua.args import dataclass_to_dict
from lingua.distributed import (
    clean_env,
    get_dp_rank_and_degree,
    run_on_rank_0,
    run_together,
)
from lingua.errors import UserError
from lingua.files.jsonl_log import is_recorded, repair_jsonl
from lingua.logger import log_on_rank_0
from lingua.metrics import MetricLogger
from lingua.rng import get_rng_state, set_rng_state
from lingua.slurm.background import failure, has_slurm
from lingua.stool import StoolArgs, launch_in_background
from lingua.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

GPUS_PER_NODE = 8
RECORDS = "metrics.eval.jsonl"


# ---- in training


class CheckpointEvaluator:
    """Calls are collectives. Does nothing where `eval.harness` is null."""

    def __init__(self, args: TrainArgs, metrics: MetricLogger, should_stop: Callable[[], bool]):
        self.args, self.metrics, self.should_stop = args, metrics, should_stop
        self.eval = args.eval or EvalArgs()
        self.jobs: dict[int, Any] = {}  # submitit's handle, by step, of those not known to be done

    def resume(self, step: int) -> None:
        """Forget scores of steps that are trained again; make up for an evaluation that is owed."""
        if self.eval.harness is None:
            return
        if self.args.async_eval_gpus is None:
            run_on_rank_0(lambda: repair_jsonl(Path(self.args.dump_dir, RECORDS), step))
        owed = run_on_rank_0(lambda: owed_evaluation(self.args, step))
        if owed is not None:
            self(owed)

    def __call__(self, step: int) -> None:
        if self.eval.harness is None:
            return
        args = eval_args_of_step(self.args, step)
        try:
            if self.args.async_eval_gpus is not None:
                run_on_rank_0(lambda: self._submit(step, args))
            else:
                self._evaluate(args)
        except Exception as error:
            again = f"python -m apps.LT2.eval ckpt_dir={args.ckpt_dir} ..."
            logger.error(
                "the evaluation of step %d failed, training goes on; by hand: %s\n%s",
                *(step, again, error),
                exc_info=not isinstance(error, UserError),
            )

    def _submit(self, step: int, args: EvalArgs) -> None:
        """A job for this step, and a word about those before that have failed."""
        for before in [before for before, job in self.jobs.items() if job.done()]:
            problem = failure(self.jobs.pop(before))
            if problem:
                logger.error("the evaluation job of step %d failed: %s", before, problem)
        self.jobs[step] = submit_evaluation(self.args, args)

    def _evaluate(self, args: EvalArgs) -> None:
        def attempt() -> dict[str, Any] | None:
            try:
                return evaluate(args, self.should_stop)
            except EvaluationStopped:
                return None

        state = get_rng_state()  # the harness seeds every generator for itself
        try:
            # A rank that fails between collectives must not leave the others in the next one.
            scores = run_together(attempt)
        finally:
            set_rng_state(state)
            gc.collect()  # of a second model; training has switched automatic collections off
            torch.cuda.empty_cache()  # nothing without CUDA
        if scores is None:
            logger.warning("the evaluation of step %s was given up to leave", args.global_step)
        else:
            self.metrics.send({"global_step": args.global_step, **flatten_scores(scores)})


def owed_evaluation(args: TrainArgs, step: int) -> int | None:
    """The last step, up to `step`, that was to be evaluated by the harness, if nothing is on disk
    of it but its checkpoint."""
    every, harness = args.checkpoint.eval.every, (args.eval or EvalArgs()).harness
    last = step - step % every if every > 0 and step != args.steps else step
    is_due = last > 0 and (last == args.steps or args.checkpoint.eval.fires(last))
    has_weights = Path(str(args.checkpoint.path), f"{last:010d}").is_dir()
    if harness is None or not is_due or not has_weights:
        return None
    if args.async_eval_gpus is not None:
        is_done = (results_folder(args, last) / "submit.slurm").exists()
    else:
        is_done = is_recorded(Path(args.dump_dir, RECORDS), last)
    return None if is_done else last


def results_folder(args: TrainArgs, step: int) -> Path:
    return Path(args.dump_dir, (args.eval or EvalArgs()).name, f"{step:010d}")


def eval_args_of_step(args: TrainArgs, step: int) -> EvalArgs:
    """`eval:` for the checkpoint of `step`; the harness alone."""
    assert args.checkpoint.path is not None
    folder = results_folder(args, step)
    folder.mkdir(parents=True, exist_ok=True)
    return replace(
        args.eval or EvalArgs(),
        name=f"{args.name}_{folder.parent.name}_{step}",
        dump_dir=str(folder),
        metric_log_dir=args.dump_dir,
        ckpt_dir=str(Path(args.checkpoint.path, f"{step:010d}")),
        validation=None,
        global_step=step,
    )


def submit_evaluation(train_args: TrainArgs, args: EvalArgs) -> Any:
    """Submit a job to the partition that this one runs in, or, without SLURM, start one on GPUs of
    this machine that training does not use; submitit's handle. On rank 0 alone."""
    n_gpus = train_args.async_eval_gpus
    assert n_gpus is not None
    logging_wandb = train_args.logging.wandb
    if args.wandb is None and logging_wandb is not None:
        args = replace(args, wandb=replace(logging_wandb, id=None, resume=None, name=args.name))
    slurm, gpus = has_slurm(), None
    if not slurm:
        gpus = free_gpus(n_gpus)  # counts training's processes: before they are hidden
    nodes = n_nodes(n_gpus) if slurm else 1
    where: dict[str, Any] = {
        option: os.environ[name]
        for option, name in (
            ("partition", "SLURM_JOB_PARTITION"),
            ("account", "SLURM_JOB_ACCOUNT"),
            ("qos", "SLURM_JOB_QOS"),
        )
        if os.environ.get(name)
    }
    given = StoolArgs(
        config=dataclass_to_dict(args),
        launcher="sbatch" if slurm else "bash",
        script="apps.LT2.eval",
        copy_code=False,
        dirs_exists_ok=True,
        nodes=nodes,
        ngpu=n_gpus // nodes,
        **where,
    )
    with clean_env():
        return launch_in_background(given, gpus=gpus)


def n_nodes(n_gpus: int) -> int:
    """The fewest machines, of eight GPUs at most, that can each take the same number."""
    nodes = math.ceil(n_gpus / GPUS_PER_NODE)
    while n_gpus % nodes:
        nodes += 1
    return nodes


def build_validator(args: TrainArgs) -> Validator | None:
    validation = (args.eval or EvalArgs()).validation
    if validation is None:
        return None
    tokenizer = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path)
    validator = Validator(validation, args.data, tokenizer)
    run_together(validator.rows)  # now: a mistake in its text should not show up hours later
    return validator


def metrics_path(args: TrainArgs) -> Path:
    return Path(args.dump_dir, "metrics.jsonl")


def is_validation_owed(args: TrainArgs, step: int) -> bool:
    """Whether the run that saved this step left before the end of its validation."""
    validation = (args.eval or EvalArgs()).validation
    is_eval = step == args.steps or args.checkpoint.eval.fires(step)
    if step == 0 or not is_eval or validation is None:
        return False
    has_text = bool(find_sources(validation, args.data))
    return has_text and not is_recorded(metrics_path(args), step, "loss/val")


def validate(
    validator: Validator | None,
    trainer: Trainer,
    metrics: MetricLogger,
    should_stop: Callable[[], bool],
) -> None:
    if validator is None:
        return
    rank, degree = get_dp_rank_and_degree(trainer.mesh)
    place = {"device": trainer.device, "rank": rank, "world_size": degree}
    scores = validator(trainer.model, **place, should_stop=should_stop)
    if scores:
        metrics.log({"global_step": trainer.state.step, "acc_step": 0, **scores})
        log_on_rank_0(
            "step %d  validation loss %.4f nats per token, %.4f bits per byte",
            trainer.state.step,
            scores["loss/val"],
            scores["loss/val_bpb"],
        )
