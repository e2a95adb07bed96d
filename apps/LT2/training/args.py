"""Everything that a training run can be told, and what is refused before it starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.evaluation.tasks import find_tasks, import_lm_eval
from apps.LT2.evaluation.validation import check_validation_sources
from apps.LT2.inference.load import check_kernels
from apps.LT2.kernel.attention import check_attention_device
from apps.LT2.parallel import check_tensor_parallel
from apps.LT2.training.unused_options import check_unused_options
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.checkpoint import CheckpointArgs, CheckpointManager, check_init
from lingua.data import validate_data_args
from lingua.dataloader.args import DataArgs
from lingua.distributed import (
    EnvironmentArgs,
    fit_to_world,
    get_device,
    get_is_master,
    get_world_size,
)
from lingua.errors import UserError
from lingua.metrics import LoggingArgs, check_logging_packages
from lingua.optim import OptimArgs
from lingua.parallel.args import DistributedArgs, resolve_dtype
from lingua.parallel.ranks import get_local_world_size
from lingua.profiling import ProfilerArgs
from lingua.slurm.background import has_slurm, import_submitit, visible_gpus
from lingua.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class TrainArgs:
    name: str = "lingua"  # name of the run, in wandb and in SLURM
    dump_dir: str = ""  # folder for everything that the run writes; required
    seed: int = 42  # rules model.seed and data.seed where they are null
    grad_acc_steps: int = 1  # micro-batches of an optimizer step, of data.batch_size each
    gc_collect_freq: int = 1000  # steps between garbage collections; Python's own are off
    probe_freq: int | None = None  # steps between probes of layers and loops; null = never
    steps: int = 1000  # optimizer steps in all
    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    model: LoopedTransformerArgs = field(default_factory=LoopedTransformerArgs)
    distributed: DistributedArgs = field(default_factory=DistributedArgs)
    env: EnvironmentArgs = field(default_factory=EnvironmentArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    profiling: ProfilerArgs = field(default_factory=ProfilerArgs)
    logging: LoggingArgs = field(default_factory=LoggingArgs)
    # GPUs of a job of its own for each evaluation by the harness, in SLURM, or, without it, on this
    # machine beside training's; null = inside training
    async_eval_gpus: int | None = None
    # at checkpoint.eval.every and at the end; null = validation with its defaults, no harness
    eval: EvalArgs | None = None


def validate_train_args(
    args: TrainArgs, output_size: int | None = None, *, world_size: int | None = None
) -> TrainArgs:
    """The same settings with every default filled in; a mistake is a UserError, before any work.

    `output_size` is the tokenizer's vocabulary; None builds the tokenizer to ask it. `world_size`
    means a job elsewhere, of so many processes; None is this one, whose devices are checked, too.
    """
    if not args.dump_dir:
        raise UserError("dump_dir is empty: name a folder for the run, e.g. dump_dir=runs/debug")
    for name in ("steps", "grad_acc_steps", "gc_collect_freq"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} must be at least 1")
    for name, seed in (
        ("seed", args.seed),
        ("model.seed", args.model.seed),
        ("data.seed", args.data.seed),
    ):
        if seed is not None and not 0 <= seed < 2**63:
            raise UserError(f"{name}={seed} must be from 0 to 2**63 - 1")
    if args.model.vocab_size < 1 and args.model.vocab_size != -1:
        raise UserError(
            f"model.vocab_size={args.model.vocab_size} must be positive, or -1 for the tokenizer's"
        )
    if args.model.max_seqlen not in (LoopedTransformerArgs.max_seqlen, args.data.seq_len):
        raise UserError(
            f"model.max_seqlen={args.model.max_seqlen} is data.seq_len={args.data.seq_len} in "
            "training: set data.seq_len, and leave model.max_seqlen out"
        )
    if args.probe_freq is not None and args.probe_freq < 1:
        raise UserError(f"probe_freq={args.probe_freq} must be at least 1, or null for no probes")
    acc_freq = args.logging.acc_freq
    if acc_freq is not None and acc_freq >= args.grad_acc_steps:
        raise UserError(
            f"logging.acc_freq={acc_freq} with grad_acc_steps={args.grad_acc_steps}: no record "
            "would come inside a step; make it smaller, or null"
        )
    if args.data.n_views != 2:
        raise UserError(
            f"data.n_views={args.data.n_views}: this trainer predicts one next token; use 2"
        )
    distributed = fit_to_world(
        args.distributed, get_world_size() if world_size is None else world_size
    )
    if output_size is None:
        output_size = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path).n_words
    model = replace(
        args.model,
        seed=args.seed if args.model.seed is None else args.model.seed,
        vocab_size=output_size if args.model.vocab_size < 0 else args.model.vocab_size,
        max_seqlen=args.data.seq_len,
    )
    if model.vocab_size < output_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {output_size} "
            "pieces; leave it at -1"
        )
    data = replace(args.data, seed=args.seed if args.data.seed is None else args.data.seed)
    validate_data_args(data, distributed.dp_replicate * distributed.dp_shard)
    check_model(model, distributed.tp_size)
    check_unused_options(model)
    if world_size is None:
        check_device(model, distributed)
    check_logging_packages(args.logging)
    validation = (args.eval or EvalArgs()).validation
    if validation is not None:
        check_validation_sources(validation, "eval.validation")
    check_eval_args(args)
    checkpoint = args.checkpoint
    if checkpoint.path is None:
        checkpoint = replace(checkpoint, path=str(Path(args.dump_dir, "checkpoints")))
    if not CheckpointManager(checkpoint).existing_saves:
        check_init(checkpoint)
    return replace(args, distributed=distributed, model=model, data=data, checkpoint=checkpoint)


def check_model(model: LoopedTransformerArgs, tp_size: int) -> None:
    """Refuse impossible shapes, patterns and backends, by building the model without memory."""
    try:
        with torch.device("meta"):
            whole = LoopedTransformer(model)
    except (RuntimeError, TypeError) as error:
        if "verflow" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"model: its sizes are beyond any memory ({reason})") from None
    check_tensor_parallel(whole, tp_size)


def check_device(model: LoopedTransformerArgs, distributed: DistributedArgs) -> None:
    """Refuse kernels that this machine cannot run, at the start and not at the first backward."""
    device_type = get_device().type
    dtype = resolve_dtype(distributed.model_dtype, device_type)
    check_attention_device(model.attn_impl, device_type=device_type, dtype=dtype, training=True)
    check_kernels(model, device_type)


FILLED_IN = ("dump_dir", "metric_log_dir", "ckpt_dir", "global_step")


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
