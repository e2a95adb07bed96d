"""Score a checkpoint: tasks of the LM-Evaluation-Harness, and the loss on held-out text.

    torchrun --nproc-per-node 8 -m apps.LT2.eval config=apps/LT2/configs/600M/eval.yaml \\
        ckpt_dir=runs/demo

Requests are shared by all processes; the numbers are those of a single one. Into `dump_dir` go

    results.json              what lm_eval reports, in its own form
    results_<date>.json       the same under the harness's own name, and samples_<task>_<date>.jsonl
    validation.json           nats per token, bits per byte and perplexity
    eval.log

and a line each into metrics.eval.jsonl and metrics.validation.jsonl of `metric_log_dir`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from apps.LT2.evaluation.args import EvalArgs as EvalArgs
from apps.LT2.evaluation.args import LMHarnessArgs as LMHarnessArgs
from apps.LT2.evaluation.evaluate import Scores, _as_ckpt_dir, evaluate
from apps.LT2.evaluation.tasks import find_tasks
from apps.LT2.inference.load import (
    find_checkpoint,
    read_config,
)
from lingua.args import parse_args
from lingua.checkpointing.folder import is_checkpoint
from lingua.distributed import get_is_master, setup_torch_distributed
from lingua.errors import UserError, run_cli
from lingua.files.lock import make_and_lock_folders, make_writable
from lingua.logger import init_logger
from lingua.parallel.args import DistributedArgs

logger = logging.getLogger(__name__)


def launch_eval(given: EvalArgs) -> dict[str, Scores]:
    """Evaluate in processes of their own: alone, or all that torchrun or srun started."""
    args = resolve(given)
    assert args.dump_dir is not None
    # What the checkpoint lies in is the training run's to hold, which may go on.
    is_of_training = Path(args.dump_dir).resolve() in Path(args.ckpt_dir).resolve().parents
    folders = {} if is_of_training else {"dump_dir": args.dump_dir}
    with make_and_lock_folders(folders, is_master=get_is_master()):
        init_logger(Path(args.dump_dir, "eval.log"))
        setup_torch_distributed(DistributedArgs(model_dtype="fp32"))  # no group in one process
        return evaluate(args)


def resolve(args: EvalArgs) -> EvalArgs:
    """The same settings with every folder filled in; mistakes are found before any work."""
    if args.harness is None and args.validation is None:
        raise UserError(
            "harness=null validation=null: nothing to do; name tasks, e.g. "
            "harness.tasks=[hellaswag], or leave validation at its default"
        )
    if not args.ckpt_dir:
        raise UserError("ckpt_dir is empty: name a run's folder or a checkpoint, ckpt_dir=runs/...")
    source = _as_ckpt_dir(lambda: find_checkpoint(args.ckpt_dir))
    _as_ckpt_dir(lambda: read_config(source))
    step_folder = next((p for p in (source, *source.parents) if is_checkpoint(p)), None)
    step = int(step_folder.name) if step_folder is not None else None
    run = step_folder.absolute().parent.parent if step_folder is not None else None
    if args.dump_dir is None and (run is None or step_folder is None):
        raise UserError(
            f"dump_dir is not set: {source} belongs to no run; name a folder for the results, e.g. "
            "dump_dir=evals/demo"
        )
    folder = Path(args.dump_dir) if args.dump_dir is not None else None
    log_folder = args.metric_log_dir or args.dump_dir or str(run)
    if folder is None:
        assert run is not None and step_folder is not None
        folder = run / "evals" / step_folder.name
    make_writable("dump_dir", folder)
    make_writable("metric_log_dir", Path(log_folder))
    if args.harness is not None and args.harness.use_cache is not None:
        make_writable("harness.use_cache", Path(args.harness.use_cache).parent)
    return replace(
        args,
        ckpt_dir=str(source),
        dump_dir=str(folder),
        metric_log_dir=log_folder,
        global_step=step if args.global_step is None else args.global_step,
    )


# ---- the harness


# ---- held-out text


# ---- records


# ---- the command


def validate_before_submit(args: EvalArgs, world_size: int) -> None:
    """What stool asks before it writes or submits anything."""
    resolve(args)
    if args.harness is not None:
        find_tasks(args.harness)


def input_paths(args: EvalArgs) -> dict[str, str | None]:
    """Map options to the paths that are read; stool's override leaves them in place."""
    return {"ckpt_dir": args.ckpt_dir, "tokenizer_path": args.tokenizer_path}


def main(argv: list[str]) -> None:
    args = parse_args(
        EvalArgs,
        argv,
        prog="python -m apps.LT2.eval",
        description="Score a checkpoint on tasks of the LM-Evaluation-Harness and on text.",
        examples=(
            "torchrun --nproc-per-node 8 -m apps.LT2.eval config=apps/LT2/configs/600M/eval.yaml "
            "ckpt_dir=runs/demo",
            "python -m apps.LT2.eval ckpt_dir=runs/demo harness.tasks=[arc_easy] validation=null",
        ),
    )
    launch_eval(args)


if __name__ == "__main__":
    run_cli(main)
