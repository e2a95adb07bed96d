"""Score one checkpoint: the harness, the loss on held-out text, and the records of both."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from apps.LT2.evaluation.args import EvalArgs as EvalArgs
from apps.LT2.evaluation.args import LMHarnessArgs as LMHarnessArgs
from apps.LT2.evaluation.tasks import import_lm_eval, load_tasks
from apps.LT2.evaluation.validation import ValidationArgs, Validator, check_validation_sources
from apps.LT2.inference.load import (
    LoadedModel,
    load_model_and_tokenizer,
    resolve_device,
)
from lingua.args import dataclass_from_dict, flatten_dict
from lingua.dataloader.args import DataArgs
from lingua.distributed import get_is_master, run_on_rank_0, run_together
from lingua.errors import UserError
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import append_whole, json_line, repair_jsonl
from lingua.metrics import start_wandb
from lingua.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Scores = dict[str, Any]


# What simple_evaluate does on disk, or prints, from any rank that asks for it.
OF_ONE_RANK = ("cache_requests", "rewrite_requests_cache", "delete_requests_cache", "write_out")


def evaluate(args: EvalArgs, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Scores]:
    """{"evals": scores by task, "validation": ...}, the same on all ranks. A collective.

    `args` has its folders filled in. Each rank loads the whole model.
    """
    # What can fail without a model comes first.
    harness = args.harness
    manager = None if harness is None else run_together(lambda: load_tasks(harness))
    loaded = run_together(lambda: load(args))
    scores: dict[str, Scores] = {}
    if args.validation is not None:
        scores["validation"] = validate(args, args.validation, loaded)
    if harness is not None:
        results = run_harness(args, harness, loaded, manager, should_stop)
        scores["evals"] = run_on_rank_0(lambda: results["results"])
    if args.wandb is not None:
        run_on_rank_0(lambda: send_to_wandb(args, scores))
    return scores


def load(args: EvalArgs) -> LoadedModel:
    args.generator.uses_graph(resolve_device(args.generator.device))
    return _as_ckpt_dir(
        lambda: load_model_and_tokenizer(
            args.ckpt_dir,
            dtype=args.generator.dtype,
            device=args.generator.device,
            loop_count=args.loop_count,
            tokenizer_path=args.tokenizer_path,
        )
    )


def _as_ckpt_dir(work: Callable[[], Any]) -> Any:
    """The option that other programs call `ckpt` is `ckpt_dir` here."""
    try:
        return work()
    except UserError as error:
        text = str(error)
        if text.startswith("ckpt="):
            text = text.replace("ckpt=", "ckpt_dir=", 1)
        raise UserError(text) from None


def run_harness(
    args: EvalArgs,
    harness: LMHarnessArgs,
    loaded: LoadedModel,
    manager: Any,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """What lm_eval.simple_evaluate gives, written to disk; {} on other ranks than 0."""
    lm_eval = import_lm_eval()
    trackers = import_lm_eval("lm_eval.loggers.evaluation_tracker")
    from apps.LT2.evaluation.harness import EvalHarnessLM

    lm = EvalHarnessLM(
        loaded,
        args.generator,
        stride=harness.stride,
        tokenizer_path=args.tokenizer_path,
        should_stop=should_stop,
    )
    options = asdict(harness)
    for name in ("include_path", "metadata", "stride", "verbosity"):
        del options[name]  # used already
    if not get_is_master():
        options |= dict.fromkeys(OF_ONE_RANK, False)
        options["bootstrap_iters"] = 0
    assert args.dump_dir is not None
    tracker = trackers.EvaluationTracker(output_path=str(Path(args.dump_dir, "results.json")))
    with single_process_bootstrap():
        results = lm_eval.simple_evaluate(
            model=lm,
            model_args={"path": args.ckpt_dir},  # for the record
            task_manager=manager,
            evaluation_tracker=tracker if get_is_master() else None,
            **options,
        )
    run_on_rank_0(lambda: write_results(args, results or {}, tracker))
    return results if results is not None and get_is_master() else {}


@contextmanager
def single_process_bootstrap() -> Iterator[None]:
    """Standard errors without lm_eval's pool of workers: made from a process with torch's threads,
    some of them never answered. The resamples are the same."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def write_results(args: EvalArgs, results: dict[str, Any], tracker: Any) -> None:
    """Files as the harness writes them, results.json, a line for the run, and a table to read."""
    from lm_eval.utils import handle_non_serializable, make_table

    assert args.dump_dir is not None
    samples = results.pop("samples", None)
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, answers in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=answers)
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_atomic(Path(args.dump_dir, "results.json"), text)
    append_record(args, "metrics.eval.jsonl", results["results"])
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    print("\n".join(tables), flush=True)
    logger.info("results in %s", args.dump_dir)


def validate(args: EvalArgs, validation: ValidationArgs, loaded: LoadedModel) -> Scores:
    """Nats per token, bits per byte and perplexity, on disk and returned. A collective."""
    assert args.dump_dir is not None
    validator = run_together(lambda: build_validator(validation, loaded.config, loaded.tokenizer))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = loaded.model.tok_embeddings.weight.device
    scores: Scores = validator(loaded.model, device=device, rank=rank, world_size=world_size)
    scores["ppl/val"] = math.exp(min(scores["loss/val"], 700.0))
    logger.info(
        "validation: %.4f nats per token, perplexity %.3f, %.4f bits per byte",
        *(scores[name] for name in ("loss/val", "ppl/val", "loss/val_bpb")),
    )
    file = Path(args.dump_dir, "validation.json")
    run_on_rank_0(lambda: write_atomic(file, json.dumps(scores, indent=2) + "\n"))
    run_on_rank_0(lambda: append_record(args, "metrics.validation.jsonl", scores))
    return scores


def build_validator(
    validation: ValidationArgs, config: dict[str, Any], tokenizer: Tokenizer
) -> Validator:
    """The run's data options with the text that is asked for; no text at all is a mistake."""
    check_validation_sources(validation, "validation")
    data = dataclass_from_dict(DataArgs, config["data"], strict=False)
    validator = Validator(validation, data, tokenizer)
    if validator.rows() is None:
        raise UserError(
            f"validation: no *.val.jsonl with text in data.root_dir={data.root_dir} of the run "
            f"(seen from {Path.cwd()}): name other files by validation.root_dir and "
            "validation.sources, or leave it out with validation=null"
        )
    return validator


def append_record(args: EvalArgs, name: str, scores: Scores) -> None:
    """One line of JSON: when, which step, and the scores as they are nested."""
    assert args.metric_log_dir is not None
    record: dict[str, Any] = {"created_at": datetime.now(UTC).isoformat()}
    if args.global_step is not None:
        record["global_step"] = args.global_step
    file = Path(args.metric_log_dir, name)
    repair_jsonl(file, None)
    append_whole(file, json_line(record | scores).encode())


def numbers(scores: dict[str, Scores]) -> dict[str, float]:
    """{"evals/hellaswag/acc,none": 0.3, ...}: what curves are drawn from."""
    flat = flatten_dict(scores, sep="/")
    return {k: v for k, v in flat.items() if isinstance(v, int | float)}


def send_to_wandb(args: EvalArgs, scores: dict[str, Scores]) -> None:
    assert args.wandb is not None and args.dump_dir is not None
    run = start_wandb(args.wandb, args, Path(args.dump_dir))
    run.log(numbers(scores), step=args.global_step)
    run.finish()
