"""Options of a training run, and the checks before it starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from apps.LT2.evaluation.args import (
    EvalArgs,
    LMHarnessArgs,
    check_loop_counts,
    check_stride,
    parse_target,
)
from apps.LT2.evaluation.tasks import find_tasks, import_lm_eval, load_tasks
from apps.LT2.evaluation.validation import check_validation_sources, find_sources, task_of
from apps.LT2.inference.load import check_kernels
from apps.LT2.kernel.attention import check_attention_device
from apps.LT2.loop_loss import check_exits
from apps.LT2.parallel import check_tensor_parallel
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs, build_on_meta
from lingua.checkpoint import (
    CONFIG_NAME,
    INIT_OPTION,
    CheckpointArgs,
    CheckpointManager,
    check_init,
    find_checkpoint,
)
from lingua.data import fill_in_sources, validate_data_args
from lingua.dataloader.args import DataArgs
from lingua.dataloader.synthetic.args import build_task
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
from lingua.tokenizer import build_tokenizer, with_sha256

# Options of `eval:` that training sets for each checkpoint.
SET_BY_TRAINING = ("dump_dir", "metric_log_dir", "ckpt_dir", "global_step")


@dataclass
class TrainArgs:
    name: str = "lingua"  # name of the run, in wandb and in SLURM
    dump_dir: str = ""  # folder for everything that the run writes; required
    seed: int = 42  # also model.seed and data.seed if they are null
    grad_acc_steps: int = 1  # micro-batches of data.batch_size in an optimizer step
    gc_collect_freq: int = 1000  # steps between garbage collections; automatic ones are off
    probe_freq: int | None = None  # steps between probes of layers and loops; null = never
    steps: int = 1000  # total optimizer steps
    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    model: LoopedTransformerArgs = field(default_factory=LoopedTransformerArgs)
    distributed: DistributedArgs = field(default_factory=DistributedArgs)
    env: EnvironmentArgs = field(default_factory=EnvironmentArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    profiling: ProfilerArgs = field(default_factory=ProfilerArgs)
    logging: LoggingArgs = field(default_factory=LoggingArgs)
    # GPUs of a separate job for each evaluation with the harness, in SLURM or on free GPUs of this
    # machine; null = evaluate inside training
    async_eval_gpus: int | None = None
    # every checkpoint.eval.every steps and at the end; null = validation with its defaults only
    eval: EvalArgs | None = None


def validate_train_args(
    args: TrainArgs, output_size: int | None = None, *, world_size: int | None = None
) -> TrainArgs:
    """Return `args` with every default filled in. UserError for a mistake.

    `output_size` is the vocabulary size; None takes the tokenizer's. `world_size` is the number of
    processes of a job to submit; None means this job, and also checks its devices.
    """
    return check_and_build(args, output_size, world_size=world_size)[0]


def check_and_build(
    args: TrainArgs, output_size: int | None = None, *, world_size: int | None = None
) -> tuple[TrainArgs, LoopedTransformer]:
    """Do the work of validate_train_args, and also return the model on meta that it builds."""
    check_numbers(args)
    args = fill_in_defaults(
        args, output_size, get_world_size() if world_size is None else world_size
    )
    validate_data_args(args.data, args.distributed.dp_replicate * args.distributed.dp_shard)
    model = build_on_meta(args.model)
    check_tensor_parallel(model, args.distributed.tp_size)
    if world_size is None:
        check_device(args.model, args.distributed)
    check_logging_packages(args.logging)
    check_eval_args(args, is_here=world_size is None)
    checkpoints = CheckpointManager(args.checkpoint)
    checkpoints.check_foreign()
    if not checkpoints.existing_saves:
        check_init(args.checkpoint, args.steps)
    check_same_loops(args, checkpoints)
    return args, model


def check_same_loops(args: TrainArgs, checkpoints: CheckpointManager) -> None:
    """Raise UserError if the run would resume from a checkpoint with another loop_count."""
    init, continues = args.checkpoint.init_ckpt_path, args.checkpoint.continue_training_from_init
    if checkpoints.existing_saves:
        source, remedy = checkpoints.existing_saves[-1], "start a new run in another dump_dir with"
    elif init is not None and continues:
        source = find_checkpoint(init, INIT_OPTION)
        remedy = "set checkpoint.continue_training_from_init=false, and keep"
    else:
        return
    try:
        saved = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
        loop_count = int(saved["model"].get("loop_count", LoopedTransformerArgs.loop_count))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # loading reports a damaged checkpoint, or takes an earlier one
    if loop_count != args.model.loop_count:
        raise UserError(
            f"model.loop_count={args.model.loop_count} can't resume {source}, which has "
            f"model.loop_count={loop_count}; {remedy} checkpoint.init_ckpt_path={source}, which "
            "takes the weights and adds or drops gates"
        )


def check_numbers(args: TrainArgs) -> None:
    """Raise UserError for values that are wrong with any data, tokenizer and machine."""
    if not args.dump_dir:
        raise UserError("dump_dir is empty; name a folder for the run, e.g. dump_dir=runs/debug")
    for name in ("steps", "grad_acc_steps", "gc_collect_freq"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} must be at least 1")
    if args.probe_freq is not None and args.probe_freq < 1:
        raise UserError(f"probe_freq={args.probe_freq} must be at least 1, or null")
    seeds = {"seed": args.seed, "model.seed": args.model.seed, "data.seed": args.data.seed}
    for name, seed in seeds.items():
        if seed is not None and not 0 <= seed < 2**63:
            raise UserError(f"{name}={seed} must be from 0 to 2**63 - 1")
    max_seqlen = args.model.max_seqlen  # an imported model may have a longer one
    if max_seqlen != LoopedTransformerArgs.max_seqlen and max_seqlen < args.data.seq_len:
        raise UserError(
            f"model.max_seqlen={max_seqlen} contradicts data.seq_len={args.data.seq_len}; set only "
            "data.seq_len"
        )
    if args.distributed.model_dtype == "fp16":
        raise UserError(
            "distributed.model_dtype=fp16 rounds small gradients to zero, since training doesn't "
            "scale the loss; use bf16, fp32 or auto, also to resume a run that used fp16"
        )
    check_exits(args.model.loop_loss, args.model.loop_count)
    if args.data.n_views != 2:
        raise UserError(f"data.n_views={args.data.n_views} must be 2: input and next token")


def fill_in_defaults(args: TrainArgs, output_size: int | None, world_size: int) -> TrainArgs:
    task = None if args.data.task is None else build_task(args.data.task)
    vocabulary = "the tokenizer's" if task is None else f"data.task.name={task.name}'s"
    if output_size is None and task is not None:
        output_size = task.n_tokens
    elif output_size is None:
        tokenizer = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path)
        tokenizer.check_specials(args.data.add_bos, args.data.add_eos)
        output_size = tokenizer.n_words
    vocab_size = output_size if args.model.vocab_size == -1 else args.model.vocab_size
    if vocab_size < output_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is below {vocabulary} {output_size} tokens; set -1 "
            "for that size"
        )
    model_seed, data_seed = (
        args.seed if seed is None else seed for seed in (args.model.seed, args.data.seed)
    )
    path = args.checkpoint.path or str(Path(args.dump_dir, "checkpoints"))
    seq_len = args.data.seq_len
    return replace(
        args,
        distributed=fit_to_world(args.distributed, world_size),
        model=replace(args.model, seed=model_seed, vocab_size=vocab_size, max_seqlen=seq_len),
        data=replace(
            fill_in_sources(args.data), seed=data_seed, tokenizer=with_sha256(args.data.tokenizer)
        ),
        checkpoint=replace(args.checkpoint, path=path),
    )


def check_device(model: LoopedTransformerArgs, distributed: DistributedArgs) -> None:
    """Raise UserError for kernels that this machine can't run."""
    device_type = get_device().type
    dtype = resolve_dtype(distributed.model_dtype, device_type)
    check_attention_device(model.attn_impl, device_type=device_type, dtype=dtype, training=True)
    check_kernels(model, device_type)


# ---- eval


def check_eval_args(args: TrainArgs, *, is_here: bool) -> None:
    """Raise UserError if the evaluations of this run would fail.

    `is_here` means that this process trains. Only then the tasks are loaded with their data.
    """
    given, n_gpus = args.eval or EvalArgs(), args.async_eval_gpus
    if given.validation is not None:
        check_validation_sources(given.validation, "eval.validation")
        task_of(given.validation, args.data, "eval.validation")  # refuses contradictions
        find_sources(given.validation, args.data)  # refuses unreadable files
    check_loop_counts(given, args.model, "eval.")
    check_target(args, given)
    for name in SET_BY_TRAINING:
        value = getattr(given, name)
        if value not in (None, ""):
            raise UserError(f"eval.{name}={value}: training sets this itself; remove it")
    if given.wandb is not None and n_gpus is None:
        raise UserError("eval.wandb needs async_eval_gpus; inside training set logging.wandb")
    if n_gpus is not None and n_gpus < 1:
        raise UserError(f"async_eval_gpus={n_gpus} must be at least 1, or null")
    if given.harness is None:
        return
    if args.data.task is not None:
        raise UserError(
            f"eval.harness reads text, but data.task.name={args.data.task.name} has no tokenizer; "
            "set eval.harness=null"
        )
    if n_gpus is not None:
        if has_slurm():
            import_submitit(f"async_eval_gpus={n_gpus}")
        else:
            find_free_gpus(n_gpus)
    import_lm_eval(needed_by="eval.harness.tasks")
    try:
        check_harness(args, given, given.harness, is_here=is_here)
    except UserError as error:
        raise UserError(f"eval.{error}") from None


def check_target(args: TrainArgs, given: EvalArgs) -> None:
    """Raise UserError if the validation doesn't measure the metric of eval.stop_at."""
    if given.stop_at is None:
        return
    names: list[str] = []
    if given.validation is not None and (
        args.data.task is not None or find_sources(given.validation, args.data)
    ):
        names = ["loss/val", "acc/val" if args.data.task is not None else "loss/val_bpb"]
        names += [f"{name}/{T}" for T in given.loop_counts or [] for name in names]
    if parse_target(given.stop_at).metric not in names:
        has = f"it has {', '.join(names)}" if names else "the run has none"
        raise UserError(f"eval.stop_at={given.stop_at} needs a metric of the validation; {has}")


def check_harness(
    args: TrainArgs, given: EvalArgs, harness: LMHarnessArgs, *, is_here: bool
) -> None:
    window = given.generator.max_prompt_len or args.data.seq_len
    check_stride(harness.stride, window)
    if harness.use_cache is not None and args.async_eval_gpus is None and get_world_size() > 1:
        raise UserError(
            f"harness.use_cache={harness.use_cache} works with one process, not "
            f"{get_world_size()}; remove it"
        )
    if not get_is_master():  # the harness reads thousands of files
        return
    if is_here:
        load_tasks(harness, given.generator, args.data.tokenizer, window)
    else:
        find_tasks(harness)


def find_free_gpus(n_gpus: int) -> str | None:
    """Return CUDA_VISIBLE_DEVICES of `n_gpus` that training leaves free. None without GPUs."""
    visible, n_training = visible_gpus(), get_local_world_size()
    if not visible:
        return None
    if len(visible) < n_training + n_gpus:
        raise UserError(
            f"async_eval_gpus={n_gpus}: without SLURM the job runs on this machine, and training "
            f"uses {n_training} of its {len(visible)} GPUs; start fewer processes, or set null to "
            "evaluate inside training"
        )
    return ",".join(visible[n_training : n_training + n_gpus])
