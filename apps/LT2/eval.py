"""Evaluate a checkpoint with the LM-Evaluation-Harness, and measure its loss on held-out text.

    torchrun --nproc-per-node 8 -m apps.LT2.eval config=apps/LT2/configs/600M/eval.yaml \\
        ckpt_dir=runs/demo

The processes share the requests. The scores don't depend on their number. Files in `dump_dir`:

    results.json              the results of lm_eval, in its own format
    results_<date>.json       the same under lm_eval's own name, and samples_<task>_<date>.jsonl
    validation.json           nats per token, bits per byte and perplexity
    eval.log

The scores are also appended to metrics.eval.jsonl and metrics.validation.jsonl in `metric_log_dir`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.evaluation.args import LMHarnessArgs as LMHarnessArgs
from apps.LT2.evaluation.evaluate import Scores, errors_name_ckpt_dir, evaluate
from apps.LT2.evaluation.tasks import find_tasks
from apps.LT2.evaluation.validation import ValidationArgs as ValidationArgs
from apps.LT2.inference.load import find_checkpoint, read_config
from lingua.args import parse_args
from lingua.checkpointing.folder import is_checkpoint
from lingua.distributed import get_is_master, setup_torch_distributed
from lingua.errors import UserError, run_cli
from lingua.files.lock import make_and_lock_folders, make_writable
from lingua.logger import init_logger
from lingua.parallel.args import DistributedArgs


def __getattr__(name: str) -> Any:
    """Find Lingua's EvalHarnessLM. Its module imports lm_eval, which takes seconds."""
    if name == "EvalHarnessLM":
        return importlib.import_module("apps.LT2.evaluation.harness").EvalHarnessLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def launch_eval(given: EvalArgs) -> dict[str, Scores]:
    """Evaluate in one process, or in all processes of torchrun or srun."""
    args = resolve(given)
    assert args.dump_dir is not None
    # The folder of a training run stays with that run, which may still be training.
    is_of_training = Path(args.dump_dir).resolve() in Path(args.ckpt_dir).resolve().parents
    folders = {} if is_of_training else {"dump_dir": args.dump_dir}
    with make_and_lock_folders(folders, is_master=get_is_master()):
        init_logger(Path(args.dump_dir, "eval.log"))
        setup_torch_distributed(DistributedArgs(model_dtype="fp32"))  # no group in one process
        return evaluate(args)


def resolve(args: EvalArgs) -> EvalArgs:
    """Return `args` with every folder set, and create the folders. UserError for a mistake."""
    if args.harness is None and args.validation is None:
        raise UserError(
            "harness=null validation=null: nothing to evaluate; set harness.tasks, e.g. "
            "harness.tasks=[hellaswag], or leave validation at its default"
        )
    if not args.ckpt_dir:
        raise UserError("ckpt_dir is empty; set it to a run's folder or a checkpoint")
    with errors_name_ckpt_dir():
        source = find_checkpoint(args.ckpt_dir)
        read_config(source)
    dump_dir, step = args.dump_dir, args.global_step
    log_dir = args.metric_log_dir or dump_dir
    step_folder = next((p for p in (source, *source.parents) if is_checkpoint(p)), None)
    if step_folder is not None:
        run = step_folder.absolute().parent.parent
        dump_dir = dump_dir or str(run / "evals" / step_folder.name)
        log_dir = log_dir or str(run)
        step = int(step_folder.name) if step is None else step
    if dump_dir is None or log_dir is None:
        raise UserError(
            f"dump_dir is not set and {source} belongs to no run; set a folder for the results, "
            "e.g. dump_dir=evals/demo"
        )
    make_writable("dump_dir", Path(dump_dir))
    make_writable("metric_log_dir", Path(log_dir))
    if args.harness is not None and args.harness.use_cache is not None:
        make_writable("harness.use_cache", Path(args.harness.use_cache).parent)
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
