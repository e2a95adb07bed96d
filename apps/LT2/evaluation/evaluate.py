"""Evaluate one checkpoint with the harness and on held-out text, and write the results."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apps.LT2.evaluation.args import EvalArgs, LMHarnessArgs, check_stride
from apps.LT2.evaluation.records import RESULTS, VALIDATION, Conditions, make_way
from apps.LT2.evaluation.tasks import import_lm_eval, load_tasks
from apps.LT2.evaluation.validation import (
    EXIT_SHARE,
    ValidationArgs,
    Validator,
    check_validation_sources,
    format_validation,
)
from apps.LT2.exits import ExitRule, check_exit
from apps.LT2.flops import exit_flops_per_token, forward_flops_per_token
from apps.LT2.inference.load import (
    LoadedModel,
    load_model_and_tokenizer,
    read_config,
    resolve_device,
    resolve_tokenizer,
    training_window,
)
from apps.LT2.transformer import LoopedTransformer
from lingua.args import dataclass_from_dict, flatten_dict
from lingua.checkpoint import find_checkpoint
from lingua.dataloader.args import DataArgs
from lingua.distributed import (
    get_global_rank,
    get_is_master,
    get_world_size,
    run_on_rank_0,
    run_together,
)
from lingua.errors import UserError
from lingua.evaluations import CHANCE, EVAL_LOG, MADE_WITH, VALIDATION_LOG, label_of
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


Part = tuple[EvalArgs, Conditions]  # one number of loops


def evaluate(
    parts: Sequence[Part], should_stop: Callable[[], bool] = lambda: False
) -> list[dict[str, Scores]]:
    """Evaluate a checkpoint once for each part; parts differ in loop_count and dump_dir alone.

    Return {"evals": scores by task, "validation": scores} of each, equal on all ranks. A
    collective. The folders must be set, and the conditions are written to every record. Each rank
    loads the whole model, once. The results of a part are written before the next one starts.
    """
    args, harness = parts[0][0], parts[0][0].harness
    # Load the tasks first: they fail faster than the model loads.
    manager = None if harness is None else run_together(lambda: load_harness_tasks(args, harness))
    loaded = run_together(lambda: load_model(args))
    if harness is not None:
        window = args.generator.max_prompt_len or loaded.model.args.max_seqlen
        check_stride(harness.stride, window)
    validator = None
    if (validation := args.validation) is not None:
        validator = run_together(lambda: build_validator(validation, loaded))
    found = [evaluate_part(part, loaded, validator, manager, should_stop) for part in parts]
    if args.wandb is not None:
        run_on_rank_0(lambda: send_to_wandb(parts, found))
    if len(parts) > 1:
        run_on_rank_0(lambda: print_loops(parts, found, loaded.model))
    return found


def evaluate_part(
    part: Part,
    loaded: LoadedModel,
    validator: Validator | None,
    manager: Any,
    should_stop: Callable[[], bool],
) -> dict[str, Scores]:
    args, conditions = part
    run_on_rank_0(lambda: Path(str(args.dump_dir)).mkdir(parents=True, exist_ok=True))
    scores: dict[str, Scores] = {}
    set_loops(args, conditions, loaded.model)
    if validator is not None:
        scores["validation"] = run_validation(args, validator, conditions, loaded)
    if (harness := args.harness) is not None:
        results = run_harness(args, harness, conditions, loaded, manager, should_stop)
        scores["evals"] = run_on_rank_0(lambda: results["results"])
    return scores


def set_loops(args: EvalArgs, conditions: Conditions, model: LoopedTransformer) -> ExitRule | None:
    """Set the loops that the model runs, and return the rule by which tokens leave before."""
    model.set_loops(conditions.options["loop_count"])
    rule = check_exit(args.generator.exit, model.args, model.n_loops)
    if rule is None or not rule.is_fixed:
        return rule
    model.set_loops(int(rule.limit))
    return None


def print_loops(
    parts: Sequence[Part], found: Sequence[Mapping[str, Scores]], model: LoopedTransformer
) -> None:
    """Print one column for each number of loops; a star marks that of training."""
    from rich.console import Console
    from rich.table import Table

    trained = model.args.loop_count
    columns: dict[str, dict[str, float]] = {}
    both = zip(parts, found, strict=True)
    for (args, conditions), scores in sorted(both, key=lambda b: b[0][1].options["loop_count"]):
        loop_count, rule = conditions.options["loop_count"], set_loops(args, conditions, model)
        cost = loop_cost(model, rule, scores.get("validation", {}))
        column = {"loops per token": cost["loops"]} if rule is not None and cost else {}
        if cost:
            column["forward MFLOPs per token"] = cost["flops_per_token"] / 1e6
        column |= scores.get("validation", {})
        for task, values in scores.get("evals", {}).items():
            for name, value in values.items():
                is_score = "," in name and "_stderr," not in name
                if is_score and isinstance(value, int | float):
                    column[f"{task} {name.removesuffix(',none')}"] = value
        columns[f"{loop_count}*" if loop_count == trained else str(loop_count)] = column
    table = Table(box=None, pad_edge=False)
    table.add_column("loops")
    for name in columns:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        values = [column.get(row, math.nan) for column in columns.values()]
        table.add_row(row, *(f"{v:,.0f}" if v >= 1e4 else f"{v:.4g}" for v in values))
    console = Console(width=max(100, 45 + 9 * len(columns)), highlight=False, markup=False)
    console.print(table)
    print(f"* loops of training: {trained}", flush=True)


def loop_cost(
    model: LoopedTransformer, rule: ExitRule | None, validation: Mapping[str, float]
) -> dict[str, float]:
    """Return the loops that the model runs, and the forward FLOPs per token of a full sequence.

    With `rule`, means over the targets of `validation`, with the FLOPs of its decisions; {} without
    validation.
    """
    seqlen = model.args.max_seqlen
    if rule is None:
        return {"loops": model.n_loops, "flops_per_token": forward_flops_per_token(model, seqlen)}
    shares = [share for name, share in validation.items() if name.startswith(EXIT_SHARE)]
    if not shares:
        return {}
    flops = exit_flops_per_token(model, seqlen, shares, kl=rule.kind == "kl")
    loops = sum(share * n for n, share in enumerate(shares, start=1))
    return {"loops": loops, "flops_per_token": round(flops)}


def load_model(args: EvalArgs) -> LoadedModel:
    args.generator.uses_graph(resolve_device(args.generator.device))
    with errors_name_ckpt_dir():
        return load_model_and_tokenizer(
            args.ckpt_dir,
            dtype=args.generator.dtype,
            device=args.generator.device,
            loop_count=args.loop_count,
            tokenizer_path=args.tokenizer_path,
            exit=args.generator.exit,
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
    config = read_config(source)
    tokenizer = resolve_tokenizer(source, config, args.tokenizer_path)
    window = args.generator.max_prompt_len or training_window(config)
    return load_tasks(harness, args.generator, tokenizer, window)


def run_harness(
    args: EvalArgs,
    harness: LMHarnessArgs,
    conditions: Conditions,
    loaded: LoadedModel,
    manager: Any,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Return the results of lm_eval.simple_evaluate and write them; {} on ranks other than 0."""
    lm_eval = import_lm_eval()
    caching = import_lm_eval("lm_eval.caching.cache")
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
    if harness.use_cache is not None:  # the harness finds answers by their prompts only
        options["use_cache"] = f"{harness.use_cache}-{conditions.digest(of_model=True)}"
    assert args.dump_dir is not None
    tracker = trackers.EvaluationTracker(output_path=str(Path(args.dump_dir, "results.json")))
    requests_cache = caching.PATH
    try:  # the harness finds prompts by the names of their tasks only
        caching.PATH = str(Path(requests_cache, conditions.digest(of_model=False)))
        results = lm_eval.simple_evaluate(
            model=lm,
            model_args={"path": args.ckpt_dir},  # recorded in the results
            task_manager=manager,
            evaluation_tracker=tracker if get_is_master() else None,
            **options,
        )
    finally:
        caching.PATH = requests_cache
    tasks, rule = manager.load([])["tasks"], set_loops(args, conditions, loaded.model)
    cost = loop_cost(loaded.model, rule, {})
    run_on_rank_0(lambda: write_results(args, conditions, cost, results or {}, tasks, tracker))
    return results if results is not None and get_is_master() else {}


def write_results(
    args: EvalArgs,
    conditions: Conditions,
    cost: Mapping[str, float],
    results: dict[str, Any],
    tasks: Mapping[str, Any],
    tracker: Any,
) -> None:
    """Write the harness's files, results.json and a metrics record, and print a table."""
    from lm_eval.utils import handle_non_serializable, make_table

    assert args.dump_dir is not None
    samples = results.pop("samples", None)
    record = conditions.record(RESULTS)
    record[MADE_WITH]["num_fewshot"] = results["n-shot"]
    if chance := {name: level for name, task in tasks.items() if (level := chance_level(task))}:
        record[CHANCE] = chance
    results |= record
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, answers in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=answers)
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    make_way(file := Path(args.dump_dir, RESULTS), conditions)
    write_atomic(file, text)
    append_record(args, EVAL_LOG, {**cost, **record, **results["results"]})
    tables = [add_chance(make_table(results), results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    print("\n".join(tables), flush=True)
    logger.info("results in %s", args.dump_dir)


def chance_level(task: Any) -> dict[str, float]:
    """Return the scores of guessing, by metric, of a task that has been evaluated.

    Of several choices, 1 / their number. Other tasks may name a level in `metadata.chance`.
    """
    known = dict((task.get_config("metadata") or {}).get("chance") or {})
    if task.get_config("output_type") == "multiple_choice":
        counts = Counter(request.doc_id for request in task.instances).values()
        metrics = list(task.aggregation())
        n_scored = 2 if "acc_mutual_info" in metrics else 1  # each choice also without its question
        level = sum(n_scored / n for n in counts) / len(counts)
        known |= {metric: level for metric in metrics if metric.startswith("acc")}
    return known


def add_chance(table: str, results: Mapping[str, Any]) -> str:
    """Add a column with the chance level to the harness's table, if any task has one."""
    levels = {scores.get("alias", name): name for name, scores in results["results"].items()}
    levels = {alias: results.get(CHANCE, {}).get(name, {}) for alias, name in levels.items()}
    if not any(levels.values()):
        return table
    lines, task = [], ""
    for i, line in enumerate(table.splitlines()):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < 6:
            lines.append(line)
            continue
        task = cells[1].lstrip("- ") or task
        level = levels.get(task, {}).get(cells[5])
        shown = {0: "Chance", 1: "-----:"}.get(i, "" if level is None else f"{level:.4f}")
        lines.append(f"{line}{shown:>6}|")
    return "\n".join(lines)


# ---- held-out text


def run_validation(
    args: EvalArgs, validator: Validator, conditions: Conditions, loaded: LoadedModel
) -> Scores:
    """Measure nats per token, bits per byte and perplexity, and write them. A collective."""
    device = loaded.model.tok_embeddings.weight.device
    rank, world_size = get_global_rank(), get_world_size()
    rule = set_loops(args, conditions, loaded.model)
    if rule is not None and not rule.may_fire(loaded.model.n_loops):
        n_loops = loaded.model.n_loops
        logger.warning("exit=%s has no effect with %d loops", args.generator.exit, n_loops)
    scores: Scores = validator(
        loaded.model, device=device, rank=rank, world_size=world_size, rule=rule
    )
    scores["ppl/val"] = math.exp(min(scores["loss/val"], MAX_NATS))
    cost, exits = loop_cost(loaded.model, rule, scores), ""
    if rule is not None:
        exits = f" exit={args.generator.exit}, {cost['loops']:.3f} loops per token"
    shown, ppl, n_loops = format_validation(scores), scores["ppl/val"], loaded.model.n_loops
    logger.info("validation, loop_count=%d%s: %s, perplexity %.3f", n_loops, exits, shown, ppl)
    record = cost | scores | conditions.record(VALIDATION)
    run_on_rank_0(lambda: write_validation(args, conditions, record))
    return scores


def write_validation(args: EvalArgs, conditions: Conditions, record: dict[str, Any]) -> None:
    assert args.dump_dir is not None
    make_way(file := Path(args.dump_dir, VALIDATION), conditions)
    write_atomic(file, json.dumps(record, indent=2) + "\n")
    append_record(args, VALIDATION_LOG, record)


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
    """Append a nested record as one JSON line, with the time and the step."""
    assert args.metric_log_dir is not None
    record: dict[str, Any] = {"created_at": datetime.now(UTC).isoformat()}
    if args.global_step is not None:
        record["global_step"] = args.global_step
    file = Path(args.metric_log_dir, name)
    repair_jsonl(file, None)
    append_whole(file, json_line(record | scores).encode())


def flatten_scores(scores: dict[str, Scores], conditions: Conditions) -> dict[str, Any]:
    """Return the numbers, {"evals/hellaswag/acc,none": 0.3, ...}, and their records as JSON.

    Options that are not the run's own are part of the names: evals/loop_count=4/hellaswag/...
    """
    flat: dict[str, Any] = {}
    for kind, of_kind in scores.items():
        file = {"evals": RESULTS, "validation": VALIDATION}[kind]
        label = label_of(conditions.differing_of(file))
        prefix = f"{kind}/{label}" if label else kind
        numbers = flatten_dict({prefix: of_kind}, sep="/").items()
        flat |= {name: value for name, value in numbers if isinstance(value, int | float)}
        flat[f"{prefix}/{MADE_WITH}"] = json.dumps(conditions.record(file))
    return flat


def send_to_wandb(parts: Sequence[Part], found: Sequence[dict[str, Scores]]) -> None:
    """Send the scores of all parts to one run."""
    args, flat = parts[0][0], {}
    assert args.wandb is not None and args.dump_dir is not None
    for (_, conditions), scores in zip(parts, found, strict=True):
        flat |= flatten_scores(scores, conditions)
    counts = [conditions.options["loop_count"] for _, conditions in parts]
    loops = {"loop_count": None, "loop_counts": counts} if counts[1:] else {"loop_count": counts[0]}
    run = start_wandb(args.wandb, replace(args, **loops), Path(args.dump_dir))
    run.log(flat, step=args.global_step)
    run.finish()
