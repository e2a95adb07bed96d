"""The validation loss inside training: when it is measured, recorded, and made up for.

A validation that a signal has ended is owed: the run that goes on from its checkpoint begins with
it, and one whose steps are all done is not finished without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from apps.LT2.evaluation.validation import Validator, places_of_text
from apps.LT2.training.args import EvalArgs, TrainArgs
from apps.LT2.training.trainer import Trainer
from lingua.distributed import get_dp_rank_and_degree, run_together
from lingua.files.jsonl_log import is_recorded
from lingua.logger import tell
from lingua.metrics import MetricLogger
from lingua.tokenizer import build_tokenizer


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
    has_text = bool(places_of_text(validation, args.data))
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
        tell(
            "step %d  validation loss %.4f nats per token, %.4f bits per byte",
            trainer.state.step,
            scores["loss/val"],
            scores["loss/val_bpb"],
        )
