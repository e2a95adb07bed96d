"""Evaluate one checkpoint with the harness and on held-out text, and write the results."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apps.LT2.evaluation.args import EvalArgs, LMHarnessArgs, check_stride
from apps.LT2.evaluation.tasks import import_lm_eval, load_tasks
from apps.LT2.evaluation.validation import ValidationArgs, Validator, check_validation_sources
from apps.LT2.inference.load import (
    LoadedModel,
    find_checkpoint,
    load_model_and_tokenizer,
    read_config,
    resolve_device,
    resolve_tokenizer,
)
from lingua.args import dataclass_from_dict, flatten_dict
from lingua.dataloader.args import DataArgs
from lingua.distributed import (
    get_global_rank,
    get_is_master,
    get_world_size,
    run_on_rank_0,
    run_together,
)
from lingua.errors import UserError
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import append_whole, json_line, repair_jsonl
from lingua.metrics import start_wandb

logger = logging.getLogger(__name__)

Scores = dict[str, Any]

# Options of simple_evaluate that write files or print, on every rank that sets them.
RANK_0_OPTIONS = ("cache_requests", "rewrite_requests_cache", "delete_requests_cache", "write_out")
# Options that simple_evaluate doesn't take, or that load_tasks has already applied.
OWN_OPTIONS = ("include_path", "metadata", "num_fewshot", "stride", "verbosity")
MAX_NATS = 700.0  # exp overflows a little above


def evaluate(args: EvalArgs, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Scores]:
    """Return {"evals": scores by task, "validation": scores}, equal on all ranks. A collective.

    The folders of `args` must be set. Each rank loads the whole model.
    """
    harness = args.harness
    # Load the tasks first: they fail faster than the model loads.
    manager = None if harness is None else run_together(lambda: load_harness_tasks(args, harness))
    loaded = run_together(lambda: load_model(args))
    if harness is not None:
        window = args.generator.max_prompt_len or loaded.model.args.max_seqlen
        check_stride(harness.stride, window)
    scores: dict[str, Scores] = {}
    if args.validation is not None:
        scores["validation"] = run_validation(args, args.validation, loaded)
    if harness is not None:
        results = run_harness(args, harness, loaded, manager, should_stop)
        scores["evals"] = run_on_rank_0(lambda: results["results"])
    if args.wandb is not None:
        run_on_rank_0(lambda: send_to_wandb(args, scores))
    return scores


def load_model(args: EvalArgs) -> LoadedModel:
    args.generator.uses_graph(resolve_device(args.generator.device))
    with errors_name_ckpt_dir():
        return load_model_and_tokenizer(
            args.ckpt_dir,
            dtype=args.generator.dtype,
            device=args.generator.device,
            loop_count=args.loop_count,
            tokenizer_path=args.tokenizer_path,
        )


@contextmanager
def errors_name_ckpt_dir() -> Iterator[None]:
    """Rename the option `ckpt` of other programs to `ckpt_dir` in a UserError."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError("ckpt_dir=" + text[5:] if text.startswith("ckpt=") else text) from None


# ---- the harness


def load_harness_tasks(args: EvalArgs, harness: LMHarnessArgs) -> Any:
    source = find_checkpoint(args.ckpt_dir)
    tokenizer = resolve_tokenizer(source, read_config(source), args.tokenizer_path)
    return load_tasks(harness, args.generator, tokenizer)


def run_harness(
    args: EvalArgs,
    harness: LMHarnessArgs,
    loaded: LoadedModel,
    manager: Any,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Return the results of lm_eval.simple_evaluate and write them; {} on ranks other than 0."""
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
    options = {name: v for name, v in asdict(harness).items() if name not in OWN_OPTIONS}
    if not get_is_master():
        options |= dict.fromkeys(RANK_0_OPTIONS, False) | {"bootstrap_iters": 0}
    assert args.dump_dir is not None
    tracker = trackers.EvaluationTracker(output_path=str(Path(args.dump_dir, "results.json")))
    results = lm_eval.simple_evaluate(
        model=lm,
        model_args={"path": args.ckpt_dir},  # recorded in the results
        task_manager=manager,
        evaluation_tracker=tracker if get_is_master() else None,
        **options,
    )
    run_on_rank_0(lambda: write_results(args, results or {}, tracker))
    return results if results is not None and get_is_master() else {}


def write_results(args: EvalArgs, results: dict[str, Any], tracker: Any) -> None:
    """Write the harness's files, results.json and a metrics record, and print a table."""
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


# ---- held-out text


def run_validation(args: EvalArgs, validation: ValidationArgs, loaded: LoadedModel) -> Scores:
    """Measure nats per token, bits per byte and perplexity, and write them. A collective."""
    assert args.dump_dir is not None
    validator = run_together(lambda: build_validator(validation, loaded))
    device = loaded.model.tok_embeddings.weight.device
    rank, world_size = get_global_rank(), get_world_size()
    scores: Scores = validator(loaded.model, device=device, rank=rank, world_size=world_size)
    scores["ppl/val"] = math.exp(min(scores["loss/val"], MAX_NATS))
    logger.info(
        "validation: %.4f nats per token, perplexity %.3f, %.4f bits per byte",
        *(scores[name] for name in ("loss/val", "ppl/val", "loss/val_bpb")),
    )
    file = Path(args.dump_dir, "validation.json")
    run_on_rank_0(lambda: write_atomic(file, json.dumps(scores, indent=2) + "\n"))
    run_on_rank_0(lambda: append_record(args, "metrics.validation.jsonl", scores))
    return scores


def build_validator(validation: ValidationArgs, loaded: LoadedModel) -> Validator:
    """Build a validator with the data options of the training run. UserError without any text."""
    check_validation_sources(validation, "validation")
    data = dataclass_from_dict(DataArgs, loaded.config["data"], strict=False)
    validator = Validator(validation, data, loaded.tokenizer)
    if validator.rows is None:
        raise UserError(
            f"validation: no *.val.jsonl with text in data.root_dir={data.root_dir} of the run "
            f"(cwd {Path.cwd()}); set validation.root_dir and validation.sources, or "
            "validation=null"
        )
    return validator


# ---- records


def append_record(args: EvalArgs, name: str, scores: Scores) -> None:
    """Append the nested scores as one JSON line, with the time and the step."""
    assert args.metric_log_dir is not None
    record: dict[str, Any] = {"created_at": datetime.now(UTC).isoformat()}
    if args.global_step is not None:
        record["global_step"] = args.global_step
    file = Path(args.metric_log_dir, name)
    repair_jsonl(file, None)
    append_whole(file, json_line(record | scores).encode())


def flatten_scores(scores: dict[str, Scores]) -> dict[str, float]:
    """Return the numbers, {"evals/hellaswag/acc,none": 0.3, ...}."""
    flat = flatten_dict(scores, sep="/")
    return {k: v for k, v in flat.items() if isinstance(v, int | float)}


def send_to_wandb(args: EvalArgs, scores: dict[str, Scores]) -> None:
    assert args.wandb is not None and args.dump_dir is not None
    run = start_wandb(args.wandb, args, Path(args.dump_dir))
    run.log(flatten_scores(scores), step=args.global_step)
    run.finish()
