"""Train a looped Transformer.

    python -m apps.LT2.train config=apps/LT2/configs/600M/debug.yaml
    torchrun --nproc-per-node 8 -m apps.LT2.train config=... model.loop_count=4 name=my_run

On CPU, on one GPU or on many, by the same code. Everything that a run leaves lies in `dump_dir`;
started again with the same `dump_dir` it goes on where it stopped.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from logging import WARNING
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from apps.LT2.flops import count_parameters, train_flops_per_token
from apps.LT2.mixers import MIXERS
from apps.LT2.parallel import (
    build_fsdp_grouping_plan,
    count_block_kinds,
    get_no_recompute_ops,
    set_activation_checkpointing,
    set_resharding,
    tp_parallelize,
)
from apps.LT2.pattern import format_layout
from apps.LT2.training.args import TrainArgs, validate_train_args
from apps.LT2.training.evaluation import (
    CheckpointEvaluator,
    build_validator,
    is_validation_owed,
    metrics_path,
    owed_evaluation,
    validate,
)
from apps.LT2.training.probes import log_micro_batches, probe_now_and_then
from apps.LT2.training.progress import Progress
from apps.LT2.training.trainer import Trainer, TrainState
from apps.LT2.training.trainer import every_n_steps as every_n_steps
from apps.LT2.training.unused_options import warnings_of_options
from apps.LT2.transformer import LoopedTransformer
from lingua.args import dump_config, parse_args
from lingua.checkpoint import CheckpointManager
from lingua.checkpointing.weights import load_initial_weights
from lingua.data import (
    build_dataloader_from_args,
    init_dataloader_state_from_args,
)
from lingua.distributed import (
    agree_any,
    check_model_value_range,
    get_device,
    get_device_mesh,
    get_dp_rank_and_degree,
    get_is_master,
    get_world_size,
    init_signal_handler,
    parallelize_model,
    requeue_slurm_job,
    run_on_rank_0,
    run_together,
    setup_env,
    setup_torch_distributed,
)
from lingua.errors import run_cli
from lingua.files.atomic import write_atomic
from lingua.files.lock import make_and_lock_folders
from lingua.logger import end_in_log_file, init_logger, log_on_rank_0
from lingua.metrics import MetricLogger
from lingua.optim import ScheduledLR, build_optimizer
from lingua.parallel.args import resolve_dtype
from lingua.parallel.torchrun import exit_with_torchrun
from lingua.parallel.watchdog import HangWatchdog
from lingua.profiling import maybe_run_profiler
from lingua.rng import seed_everything
from lingua.slurm.code import CODE_VERSION, snapshot_code, version_record

logger = logging.getLogger(__name__)

# Weights beyond these were most likely never filled.
SANE_RANGE, SANE_STD = 20.0, 5.0

preemption_flag = {"flag": False}


def set_preemption_flag(signum: int, frame: FrameType | None) -> None:
    """Signal handler: the run saves and leaves after the step that it is in."""
    logger.warning("signal %d: saving after this step, then leaving", signum)
    preemption_flag["flag"] = True


# ---- the run


def train(given: TrainArgs) -> None:
    """Train until `steps`, or until a signal asks to leave."""
    args = validate_train_args(given)
    if is_finished(args):
        return
    with ExitStack() as resources:
        folders = {"dump_dir": args.dump_dir, "checkpoint.path": str(args.checkpoint.path)}
        resources.enter_context(make_and_lock_folders(folders, is_master=get_is_master()))
        with exit_with_torchrun():  # from the first step on, a signal has the run save
            start(args)
            resources.enter_context(end_in_log_file())
            resources.enter_context(manual_garbage_collection())
            mesh, device = get_device_mesh(args.distributed), get_device()
            validator = build_validator(args)
            checkpoints = resources.enter_context(
                CheckpointManager.instantiate_and_make_dir(args.checkpoint)
            )
            model = build_model(args, mesh, device, initial_weights(args, checkpoints))
            optimizer, scheduler = build_optimizer(model, args.optim, args.steps)
            state = new_or_resumed_state(args, model, optimizer, scheduler, checkpoints, mesh)
            loader = run_together(
                lambda: build_dataloader_from_args(args.data, state.data_loader_state)
            )
            run_on_rank_0(lambda: write_record_of_run(args, given, state.step))
            describe(model, args)

            batches = resources.enter_context(loader)
            trainer = Trainer(args, model, optimizer, state, batches, mesh, device)
            progress = build_progress(args, trainer.tokens_per_step, device)
            metric_logger = MetricLogger(metrics_path(args), args, resume_step=state.step)
            metrics = run_together(lambda: resources.enter_context(metric_logger))
            profiler = resources.enter_context(
                maybe_run_profiler(args.dump_dir, model, args.profiling)
            )
            log_micro_batches(trainer, metrics, args.logging.acc_freq)
            probe_now_and_then(trainer, metrics)
            watchdog = resources.enter_context(HangWatchdog(args.distributed.timeout_minutes))

        def should_stop_evaluating() -> bool:
            """Asked after each batch of an evaluation, which may take hours and is no stall."""
            watchdog.beat(state.step)
            return preemption_flag["flag"]

        evaluate = CheckpointEvaluator(args, metrics, should_stop_evaluating)

        if run_on_rank_0(lambda: is_validation_owed(args, state.step)):
            validate(validator, trainer, metrics, should_stop_evaluating)
        evaluate.resume(state.step)
        while state.step < args.steps:
            watchdog.beat(state.step)
            progress.add(trainer.step())
            profiler.step()
            is_last, leaving = state.step == args.steps, agree_any(preemption_flag["flag"])
            is_eval = is_last or args.checkpoint.eval.fires(state.step)
            if is_last or every_n_steps(state, args.logging.freq):
                metrics.log(record := progress.record(state))
                state.clear_losses()
                log_on_rank_0(progress.line(record))
            if every_n_steps(state, args.gc_collect_freq):
                gc.collect()
            with progress.paused():
                checkpoints.poll()
                if is_eval or leaving or args.checkpoint.dump.fires(state.step):
                    checkpoints.save(model, optimizer, state, args, mesh)
                if is_eval and not leaving:
                    validate(validator, trainer, metrics, should_stop_evaluating)
                    checkpoints.finish()
                    evaluate(state.step)
                    leaving = agree_any(preemption_flag["flag"])
            if leaving:
                break
        checkpoints.finish()
        # Without a step, too, since an evaluation of the last one may have been owed.
        if agree_any(preemption_flag["flag"]):
            log_on_rank_0("left after step %d of %d, saved", state.step, args.steps, level=WARNING)
            requeue_slurm_job()


def is_finished(args: TrainArgs) -> bool:
    """Whether an earlier run has done all steps; then nothing on disk is touched."""
    assert args.checkpoint.path is not None
    newest = CheckpointManager(args.checkpoint).get_last_step_path(quiet=True)
    if newest is None or int(newest.name) < args.steps:
        return False
    if is_validation_owed(args, int(newest.name)) or owed_evaluation(args, int(newest.name)):
        return False
    if get_is_master():
        print(
            f"{newest}: {int(newest.name)} steps are done and steps={args.steps}: nothing to do; "
            "another run needs another dump_dir",
            flush=True,
        )
    return True


def start(args: TrainArgs) -> None:
    """Logs, signals, environment, and the other processes."""
    init_logger(Path(args.dump_dir, "train.log"))
    preemption_flag["flag"] = False
    init_signal_handler(set_preemption_flag)
    setup_env(args.env)
    setup_torch_distributed(args.distributed)
    seed_everything(args.seed)


@contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Python's own collections would stop the ranks at different moments, each waiting for each."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def initial_weights(args: TrainArgs, checkpoints: CheckpointManager) -> str | None:
    """checkpoint.init_ckpt_path, where the run starts with its weights and with nothing else."""
    if args.checkpoint.continue_training_from_init:
        return None
    is_new = run_on_rank_0(lambda: checkpoints.get_last_step_path(quiet=True) is None)
    return args.checkpoint.init_ckpt_path if is_new else None


def build_model(
    args: TrainArgs, mesh: DeviceMesh | None, device: torch.device, weights: str | None = None
) -> LoopedTransformer:
    """The parallel model with the usual initial weights, or those of the checkpoint `weights`."""
    with torch.device("meta"):
        model = LoopedTransformer(args.model)
    set_activation_checkpointing(model, args.distributed.activation_checkpointing)
    set_resharding(model, args.distributed.reshard_between_loops)
    parallelize_model(
        model,
        mesh,
        args.model,
        args.distributed,
        fsdp_grouping_plan=build_fsdp_grouping_plan(
            args.model, reshard_between_loops=args.distributed.reshard_between_loops
        ),
        tp_parallelize=tp_parallelize,
        no_recompute_ops=get_no_recompute_ops(),
        n_block_kinds=count_block_kinds(model),
    )
    model.to_empty(device=device)
    assert args.model.seed is not None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(args.model.seed)
        model.init_weights()
    if weights is not None:
        load_initial_weights(weights, model)
    check_model_value_range(model, range=SANE_RANGE, std=SANE_STD, zero_init=zero_at_start())
    return model


def zero_at_start() -> list[str]:
    """How the names of weights end that start at zero on purpose."""
    mixers = set(MIXERS.values())
    return ["rho", *(f"{m.module_name}.{name}" for m in mixers for name in m.zero_at_start)]


def new_or_resumed_state(
    args: TrainArgs,
    model: LoopedTransformer,
    optimizer: Optimizer,
    scheduler: ScheduledLR,
    checkpoints: CheckpointManager,
    mesh: DeviceMesh | None,
) -> TrainState:
    """The train state of a new run; after a checkpoint was loaded, of the one that goes on."""
    loader_state = init_dataloader_state_from_args(args.data, *get_dp_rank_and_degree(mesh))
    state = TrainState(0, 0, loader_state, scheduler)
    loaded = checkpoints.load(model, optimizer, state, mesh, config=args)
    if loaded is not None:
        log_on_rank_0("resumed from %s, step %d", loaded.path, loaded.step)
        for difference in loaded.differences:
            log_on_rank_0("config changed since the checkpoint: %s", difference, level=WARNING)
    return state


def write_record_of_run(args: TrainArgs, given: TrainArgs, step: int) -> None:
    """config.yaml, base_config.yaml and the code. A config that changed is kept under its step."""
    folder = Path(args.dump_dir)
    if not (folder / "base_config.yaml").exists():
        dump_config(given, folder / "base_config.yaml", log_config=False)
    config = folder / "config.yaml"
    before = config.read_bytes() if config.exists() else None
    dump_config(args, config)
    if before is not None and before != config.read_bytes():
        (folder / f"config.before_step_{step}.yaml").write_bytes(before)
    root = Path(__file__).resolve().parents[2]
    if not (folder / "code").exists() and (root / "pyproject.toml").exists():
        snapshot_code(root, folder / "code", folder.resolve())
        if not (folder / CODE_VERSION).exists():  # stool has written its own
            write_atomic(folder / CODE_VERSION, version_record(root))


def describe(model: LoopedTransformer, args: TrainArgs) -> None:
    """Tell a person what is about to run."""
    count = count_parameters(model)
    log_on_rank_0(
        "%s parameters: %s in layers, %s in embeddings, %s in residual gates",
        *(f"{n:,}" for n in (count.total, count.body, count.embedding, count.gates)),
    )
    for warning in warnings_of_options(args.model) if get_is_master() else []:
        logger.warning(warning)
    n_layers, n_loops = args.model.n_layers, args.model.loop_count
    table = format_layout(model.inference_layout, model.layout_plan.random_loops)
    log_on_rank_0("%d layers x %d loops:\n%s", n_layers, n_loops, table)
    if args.distributed.compile:
        log_on_rank_0("layers are compiled in the first step, which may take minutes")


def build_progress(args: TrainArgs, tokens_per_step: int, device: torch.device) -> Progress:
    with torch.device("meta"):
        whole = LoopedTransformer(args.model)  # a tensor-parallel one has this rank's heads alone
    return Progress(
        steps=args.steps,
        tokens_per_step=tokens_per_step,
        flops_per_token=train_flops_per_token(whole, args.data.seq_len),
        world_size=get_world_size(),
        device=device,
        dtype=resolve_dtype(args.distributed.model_dtype, device.type),
    )


def validate_before_submit(args: TrainArgs, world_size: int) -> None:
    """What stool asks before it writes or submits anything."""
    validate_train_args(args, world_size=world_size)


def input_paths(args: TrainArgs) -> dict[str, str | Path | None]:
    """Map options to the paths that the run reads; stool's override leaves them in place."""
    root = args.data.root_dir or ""
    return {
        "checkpoint.init_ckpt_path": args.checkpoint.init_ckpt_path,
        "data.tokenizer.path": args.data.tokenizer.path,
        **{f"data.sources.{source}": Path(root, source) for source in args.data.sources},
    }


def main(argv: list[str]) -> None:
    args = parse_args(
        TrainArgs,
        argv,
        prog="python -m apps.LT2.train",
        description="Train a looped Transformer.",
        examples=(
            "python -m apps.LT2.train config=apps/LT2/configs/600M/debug.yaml",
            "torchrun --nproc-per-node 8 -m apps.LT2.train config=... model.loop_count=4",
        ),
    )
    train(args)


if __name__ == "__main__":
    run_cli(main)
