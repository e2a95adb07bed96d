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
from typing import TYPE_CHECKING, Any

import torch

from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.evaluation.tasks import find_tasks, import_lm_eval
from lingua.args import UserError, dataclass_to_dict
from lingua.distributed import clean_env, get_is_master, run_on_rank_0, run_together
from lingua.files.jsonl_log import is_recorded, mend_jsonl
from lingua.metrics import MetricLogger
from lingua.parallel.ranks import get_local_world_size
from lingua.rng import get_rng_state, set_rng_state
from lingua.slurm.background import failure, has_slurm, import_submitit, visible_gpus

if TYPE_CHECKING:
    from apps.LT2.training.args import TrainArgs

logger = logging.getLogger(__name__)

GPUS_PER_NODE = 8
FILLED_IN = ("dump_dir", "metric_log_dir", "ckpt_dir", "global_step")
RECORDS = "metrics.eval.jsonl"


# ---- before training


def check_eval_args(args: TrainArgs) -> None:
    """Refuse what an evaluation of this run could not do, before it starts."""
    given, n_gpus = args.eval or EvalArgs(), args.async_eval_gpus
    for name in FILLED_IN:
        value = getattr(given, name)
        if value not in (None, ""):
            raise UserError(
                f"eval.{name}={value}: training fills this in for each checkpoint; leave it out"
            )
    if given.wandb is not None and n_gpus is None:
        raise UserError("eval.wandb: inside training scores go where logging.wandb says; set that")
    if n_gpus is not None:
        check_job(args, given, n_gpus)
    if given.harness is None:
        return
    import_lm_eval()
    if get_is_master():  # the harness reads thousands of files for it
        try:
            find_tasks(given.harness)
        except UserError as error:
            raise UserError(f"eval: {error}") from None


def check_job(args: TrainArgs, given: EvalArgs, n_gpus: int) -> None:
    if n_gpus < 1:
        raise UserError(f"async_eval_gpus={n_gpus} must be at least 1, or null")
    if given.harness is None:
        raise UserError(
            f"async_eval_gpus={n_gpus}: eval.harness is null, and the validation loss is measured "
            "in training: there is nothing for a job to do. Set eval.harness.tasks, or leave "
            "async_eval_gpus null"
        )
    import_submitit(f"async_eval_gpus={n_gpus}")
    if not has_slurm():
        free_gpus(n_gpus)
    keep = args.checkpoint.eval.keep
    if keep > 0 and get_is_master():
        logger.warning(
            "checkpoint.eval.keep=%d with async_eval_gpus: a job that starts after %d more "
            "evaluations finds its checkpoint deleted",
            *(keep, keep),
        )


def free_gpus(n_gpus: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a job on this machine beside its training; None without GPUs."""
    visible, n_training = visible_gpus(), get_local_world_size()
    if not visible:
        return None
    if len(visible) < n_training + n_gpus:
        raise UserError(
            f"async_eval_gpus={n_gpus}: there is no SLURM on this machine to submit a job to, and "
            f"training takes {n_training} of its {len(visible)} GPUs; use fewer processes, or "
            "leave it null, and evaluation runs inside training"
        )
    return ",".join(visible[n_training : n_training + n_gpus])


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
            run_on_rank_0(lambda: mend_jsonl(Path(self.args.dump_dir, RECORDS), step))
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
        from apps.LT2.eval import evaluate, numbers
        from apps.LT2.evaluation.scoring import EvaluationStopped

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
            self.metrics.send({"global_step": args.global_step, **numbers(scores)})


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
    from lingua.stool import StoolArgs, launch_in_background

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
