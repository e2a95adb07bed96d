"""Evaluate a checkpoint with the LM-Evaluation-Harness, and measure its loss on held-out text.

    torchrun --nproc-per-node 8 -m apps.LT2.eval config=apps/LT2/configs/600M/eval.yaml \\
        ckpt_dir=runs/demo

The processes share the requests. The scores don't depend on their number. Files in `dump_dir`:

    results.json              the results of lm_eval, in its own format
    results_<date>.json       the same under lm_eval's own name, and samples_<task>_<date>.jsonl
    validation.json           nats per token, bits per byte and perplexity
    eval.log

The scores are also appended to metrics.eval.jsonl and metrics.validation.jsonl in `metric_log_dir`.
All of them name the options that change a score. `dump_dir` is <run>/evals/<step> for the run's own
options, and e.g. <run>/evals/<step>-loop_count=4 for others. loop_counts=[1,2,4] evaluates one
loaded model with each number of loops, and ends with a table of all scores. exit=gate:0.8 gives the
scores of tokens that leave the loops early.
"""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from apps.LT2.evaluation.args import EvalArgs, check_loop_counts
from apps.LT2.evaluation.args import LMHarnessArgs as LMHarnessArgs
from apps.LT2.evaluation.evaluate import Scores, errors_name_ckpt_dir, evaluate
from apps.LT2.evaluation.records import choose_folder, find_conditions
from apps.LT2.evaluation.tasks import find_tasks
from apps.LT2.evaluation.validation import ValidationArgs as ValidationArgs
from apps.LT2.inference.load import read_config
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.args import dataclass_from_dict, parse_args
from lingua.checkpoint import find_checkpoint
from lingua.checkpointing.folder import is_checkpoint
from lingua.distributed import get_is_master, setup_torch_distributed
from lingua.errors import UserError, run_cli
from lingua.files.lock import check_writable, make_and_lock_folders, make_writable
from lingua.logger import init_logger
from lingua.parallel.args import DistributedArgs

logger = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    """Find Lingua's EvalHarnessLM. Its module imports lm_eval, which takes seconds."""
    if name == "EvalHarnessLM":
        return importlib.import_module("apps.LT2.evaluation.harness").EvalHarnessLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def launch_eval(given: EvalArgs) -> dict[str, Scores]:
    """Evaluate in one process, or in all processes of torchrun or srun.

    Return the scores of the first of `loop_counts`.
    """
    return launch_parts(given)[0]


def launch_parts(given: EvalArgs) -> list[dict[str, Scores]]:
    """Evaluate with each of `loop_counts`, and return the scores of each."""
    args = resolve(given)
    assert args.dump_dir is not None and args.metric_log_dir is not None
    source, base = Path(args.ckpt_dir), Path(args.dump_dir)
    parts, folders = [], [base] if given.dump_dir else []
    for one in args.for_each_loop_count():
        conditions = find_conditions(one, source, read_config(source))
        folder = base
        if given.dump_dir is None:
            folder, conditions = choose_folder(base, conditions)
        elif args.loop_counts is not None and "loop_count" in conditions.differing:
            folder = base.with_name(f"{base.name}-loop_count={one.loop_count}")
        parts.append((replace(one, dump_dir=str(folder)), conditions))
        folders.append(folder)
    make_writable("metric_log_dir", Path(args.metric_log_dir))
    with ExitStack() as locks:
        for folder in dict.fromkeys(folders):
            make_writable("dump_dir", folder)
            # The folder of a training run stays with that run, which may still be training.
            is_of_training = folder.resolve() in source.resolve().parents
            locked = {} if is_of_training else {"dump_dir": folder}
            locks.enter_context(make_and_lock_folders(locked, is_master=get_is_master()))
        init_logger(folders[0] / "eval.log")
        if args.stop_at is not None:
            logger.warning("stop_at=%s has no effect: it ends a training run", args.stop_at)
        setup_torch_distributed(DistributedArgs(model_dtype="fp32"))  # no group in one process
        return evaluate(parts)


def resolve(args: EvalArgs) -> EvalArgs:
    """Return `args` with every folder set: the one for the run's own options. UserError if wrong.

    Nothing is written.
    """
    if args.harness is None and args.validation is None:
        raise UserError(
            "harness=null validation=null: nothing to evaluate; set harness.tasks, e.g. "
            "harness.tasks=[hellaswag], or leave validation at its default"
        )
    if not args.ckpt_dir:
        raise UserError("ckpt_dir is empty; set it to a run's folder or a checkpoint")
    with errors_name_ckpt_dir():
        source = find_checkpoint(args.ckpt_dir)
        config = read_config(source)
    if args.loop_counts is not None or args.generator.exit != "none":
        model = dataclass_from_dict(LoopedTransformerArgs, config["model"], strict=False)
        check_loop_counts(args, model)
    dump_dir, step = args.dump_dir, args.global_step
    log_dir = args.metric_log_dir or dump_dir
    absolute = Path(os.path.abspath(source))
    step_folder = next((p for p in (absolute, *absolute.parents) if is_checkpoint(p)), None)
    if step_folder is not None:
        # Several runs may have their checkpoints side by side, in folders with other names.
        run = step_folder.parent
        run = run.parent if run.name == "checkpoints" else run
        dump_dir = dump_dir or str(run / "evals" / step_folder.name)
        log_dir = log_dir or str(run)
        step = int(step_folder.name) if step is None else step
    if dump_dir is None or log_dir is None:
        raise UserError(
            f"dump_dir is not set and {source} belongs to no run; set a folder for the results, "
            "e.g. dump_dir=evals/demo"
        )
    check_writable("dump_dir", Path(dump_dir))
    check_writable("metric_log_dir", Path(log_dir))
    if args.harness is not None and args.harness.use_cache is not None:
        check_writable("harness.use_cache", Path(args.harness.use_cache).parent)
    return replace(
        args, ckpt_dir=str(source), dump_dir=dump_dir, metric_log_dir=log_dir, global_step=step
    )


def validate_before_submit(args: EvalArgs, world_size: int) -> None:
    """Check `args` for stool, before it writes or submits anything."""
    resolve(args)
    if args.harness is not None:
        find_tasks(args.harness)


def input_paths(args: EvalArgs) -> dict[str, str | None]:
    """Map options to the paths that are read; stool's override leaves them in place."""
    return {"ckpt_dir": args.ckpt_dir, "tokenizer_path": args.tokenizer_path}


def main(argv: list[str]) -> None:
    args = parse_args(EvalArgs, argv, prog="python -m apps.LT2.eval", doc=__doc__)
    launch_eval(args)


if __name__ == "__main__":
    run_cli(main)
