"""Train a looped Transformer.

    python -m apps.LT2.train config=apps/LT2/configs/600M/debug.yaml
    torchrun --nproc-per-node 8 -m apps.LT2.train config=... model.loop_count=4 name=my_run

The same code runs on a CPU, on one GPU and on many. A run writes all its files to `dump_dir`. If it
is started again with the same `dump_dir`, it resumes from its newest checkpoint.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from logging import WARNING
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.evaluation.validation import Validator
from apps.LT2.flops import step_flops_per_token, train_flops_per_token
from apps.LT2.mixers import MIXERS
from apps.LT2.parallel import (
    build_fsdp_grouping_plan,
    count_block_kinds,
    get_no_recompute_ops,
    tp_parallelize,
)
from apps.LT2.pattern import format_layout
from apps.LT2.training.args import TrainArgs, check_and_build
from apps.LT2.training.args import validate_train_args as validate_train_args
from apps.LT2.training.evaluation import (
    Evaluator,
    build_run_validator,
    has_reached_target,
    is_evaluated,
    is_evaluation_missing,
    metrics_path,
)
from apps.LT2.training.first_step import log_first_step
from apps.LT2.training.probes import log_micro_batches, log_probes
from apps.LT2.training.progress import Progress
from apps.LT2.training.summary import format_summary, format_versions
from apps.LT2.training.trainer import Trainer, TrainState
from apps.LT2.training.trainer import every_n_steps as every_n_steps
from apps.LT2.training.unused_options import options_without_effect as options_without_effect
from apps.LT2.training.unused_options import train_warnings
from apps.LT2.transformer import (
    RESIZED,
    ZERO_IF_MISSING,
    LoopedTransformer,
    LoopedTransformerArgs,
)
from lingua.args import (
    dataclass_from_dict,
    dataclass_to_dict,
    diff_configs,
    dump_config,
    parse_args,
)
from lingua.checkpoint import CONFIG_NAME, INIT_OPTION, CheckpointManager, find_checkpoint
from lingua.checkpointing.save import warn_of_small_disk
from lingua.checkpointing.weights import load_initial_weights
from lingua.data import build_dataloader_from_args, init_dataloader_state_from_args
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
from lingua.errors import UserError, run_cli
from lingua.files.atomic import write_atomic
from lingua.files.lock import make_and_lock_folders
from lingua.logger import end_in_log_file, init_logger, log_on_rank_0, show_status
from lingua.metrics import MetricLogger, get_num_params
from lingua.optim import ScheduledLR, build_optimizer
from lingua.parallel.ranks import launcher
from lingua.parallel.rendezvous import check_address
from lingua.parallel.torchrun import exit_with_torchrun
from lingua.parallel.watchdog import HangWatchdog
from lingua.profiling import Profiler, maybe_run_profiler
from lingua.redact import redact, redact_all
from lingua.rng import seed_everything
from lingua.slurm.code import CODE_VERSION, snapshot_code, version_record
from lingua.slurm.script import SUBMIT_SCRIPT

logger = logging.getLogger(__name__)

# Initial weights outside this range were probably never initialized.
MAX_WEIGHT, MAX_STD = 20.0, 5.0

# Options that a finished run may differ in: where it is now, and the number of processes.
OF_THIS_START = ("dump_dir", "checkpoint.path", "distributed.dp_replicate")
TOKENIZER_SHA256 = "data.tokenizer.sha256"
# starts of a difference from a checkpoint that is older than this option
SHA256_WAS_UNKNOWN = (f"{TOKENIZER_SHA256}: null ->", f"{TOKENIZER_SHA256}: (absent) ->")
OF_EVALUATION = ("eval.", "async_eval_gpus:")


# ---- the loop


def train(given: TrainArgs) -> None:
    """Train until `steps`, or until a signal asks the run to stop."""
    check_address()
    args, model = check_and_build(given)
    if is_finished(args):
        return
    with ExitStack() as resources:
        folders = {"dump_dir": args.dump_dir, "checkpoint.path": str(args.checkpoint.path)}
        resources.enter_context(make_and_lock_folders(folders, is_master=get_is_master()))
        with exit_with_torchrun():  # until the first step; from then on a signal saves first
            run = build_run(args, given, model, resources)
        run.evaluator.catch_up()
        while not run.is_over:
            run.step()
            run.log()
            with run.progress.paused():
                run.save()
                run.evaluate()
        run.finish()


@dataclass
class Run:
    """The parts of a run, and the phases of its loop. All methods are collectives."""

    trainer: Trainer
    checkpoints: CheckpointManager
    metrics: MetricLogger
    progress: Progress
    profiler: Profiler
    watchdog: HangWatchdog
    preemption: PreemptionFlag
    validator: Validator | None
    is_stopping: bool = False  # because of a signal; equal on all ranks
    n_loops: int | None = None  # T of the last step

    def __post_init__(self) -> None:
        self.args, self.state = self.trainer.args, self.trainer.state
        self.first_step = self.state.step + 1
        self.stop_at = (self.args.eval or EvalArgs()).stop_at
        self.evaluator = Evaluator(self.trainer, self.metrics, self.validator, self.should_stop)

    def should_stop(self) -> bool:
        """Called after each batch of an evaluation, which may take hours without being a hang."""
        self.watchdog.beat(self.state.step)
        return self.preemption.is_set

    @property
    def is_over(self) -> bool:
        has_ended = self.state.step >= self.args.steps or self.evaluator.has_reached_target
        return self.is_stopping or has_ended

    def step(self) -> None:
        self.watchdog.beat(self.state.step)
        show_status(f"step {self.state.step + 1}/{self.args.steps} ...")
        is_first = self.state.step + 1 == self.first_step
        with log_first_step() if is_first else nullcontext():
            result = self.trainer.step()
        self.progress.add(result)
        plan = self.trainer.model.loop_plan
        if len(plan.phases) > 1 and result.n_loops != self.n_loops:
            log_on_rank_0("from step %d: %d loops", self.state.step, result.n_loops)
        self.n_loops = result.n_loops
        self.profiler.step()
        self.is_stopping = agree_any(self.preemption.is_set)
        if every_n_steps(self.state, self.args.gc_collect_freq):
            gc.collect()

    def log(self) -> None:
        is_last = self.state.step == self.args.steps or (
            self.stop_at is not None and is_evaluated(self.args, self.state.step)
        )
        if is_last or every_n_steps(self.state, self.args.logging.freq):
            self.metrics.log(record := self.progress.record())
            self.state.clear_losses()
            log_on_rank_0(self.progress.line(record))
        elif self.state.step == self.first_step:
            step, freq = f"step {self.state.step}/{self.args.steps}", self.args.logging.freq
            log_on_rank_0(f"{step} done; the log has a line every {freq} steps")

    def save(self) -> None:
        self.checkpoints.poll()
        step, rule = self.state.step, self.args.checkpoint.dump
        if self.is_stopping or is_evaluated(self.args, step) or rule.fires(step):
            model, optimizer, mesh = self.trainer.model, self.trainer.optimizer, self.trainer.mesh
            self.checkpoints.save(model, optimizer, self.state, self.args, mesh)

    def evaluate(self) -> None:
        if self.is_stopping or not is_evaluated(self.args, self.state.step):
            return
        self.evaluator.log_validation_loss()
        self.checkpoints.finish()
        self.evaluator.run_harness(self.state.step)
        self.is_stopping = agree_any(self.preemption.is_set)

    def finish(self) -> None:
        self.checkpoints.finish()
        if agree_any(self.preemption.is_set):  # the signal may come before the first step
            log_on_rank_0(
                "stopped after step %d of %d; the checkpoint is saved",
                *(self.state.step, self.args.steps),
                level=WARNING,
            )
            requeue_slurm_job()
        else:
            if self.evaluator.has_reached_target:
                log_on_rank_0("eval.stop_at=%s is reached", self.stop_at)
            log_on_rank_0("finished %d steps in %s", self.state.step, self.args.dump_dir)


class PreemptionFlag:
    """Set by a signal: the run saves after the current step, and exits."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler."""
        logger.warning("signal %d: saving after this step, then exiting", signum)
        self.is_set = True


# ---- the start


def is_finished(args: TrainArgs, *, quiet: bool = False) -> bool:
    """Return whether an earlier run has done everything, and print so. Nothing is written.

    UserError if an option differs from the finished run, and so would have no effect.
    """
    newest = CheckpointManager(args.checkpoint).get_last_step_path(quiet=True)
    step = int(newest.name) if newest is not None else 0
    if newest is None:
        return False
    is_reached = has_reached_target(args, step)
    if step < args.steps and not is_reached:
        return False
    is_missing = is_evaluation_missing(args, step)
    unused = find_changed_options(args, newest)
    if is_missing:
        unused = [option for option in unused if not option.startswith(OF_EVALUATION)]
    if unused:
        raise UserError(
            f"dump_dir={args.dump_dir}: the run ended after {step} steps, and these options differ "
            f"from the finished run: {'; '.join(unused)}. Use another dump_dir to train with them"
        )
    if get_is_master() and not is_missing and not quiet:
        done, option = f"{step} steps are done and steps={args.steps}", "increase steps"
        if step < args.steps and args.eval is not None:
            done, option = f"eval.stop_at={args.eval.stop_at} is reached", "change eval.stop_at"
        print(f"{newest}: {done}: nothing to do; {option}, or name another dump_dir", flush=True)
    return not is_missing


def find_changed_options(args: TrainArgs, checkpoint: Path) -> list[str]:
    """List options that differ from the checkpoint: ["optim.lr: 0.0003 -> 0.0001"]."""
    saved = json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
    # Options that are newer than the checkpoint get their defaults.
    both = dataclass_from_dict(TrainArgs, saved, strict=False), args
    both = (replace(config, eval=config.eval or EvalArgs()) for config in both)
    changes = diff_configs(*(redact_all(dataclass_to_dict(config)) for config in both))
    return [
        change
        for change in changes
        if change.partition(":")[0] not in OF_THIS_START
        and not change.startswith(SHA256_WAS_UNKNOWN)
    ]


def build_run(
    args: TrainArgs, given: TrainArgs, model: LoopedTransformer, resources: ExitStack
) -> Run:
    """Build all parts of the run, and load its newest checkpoint. A collective.

    `args` has the defaults filled in, and `given` the user's options. `model` is on meta, and is
    parallelized and allocated in place. `resources` closes what the run opens.
    """
    preemption = setup_process(args)
    resources.enter_context(end_in_log_file())
    resources.callback(show_status, "")
    gc.disable()  # ranks would collect at different times, and wait for each other each time
    resources.callback(gc.enable)
    mesh, device = get_device_mesh(args.distributed), get_device()
    validator = build_run_validator(args)
    checkpoints = CheckpointManager.instantiate_and_make_dir(args.checkpoint)
    resources.enter_context(checkpoints)
    seq_len = args.data.seq_len
    mean_flops = train_flops_per_token(model, seq_len)  # before TP splits the heads
    flops_by_loops = {T: step_flops_per_token(model, seq_len, T) for T in model.loop_plan.shares()}
    build_model(args, mesh, device, model)
    optimizer, scheduler = build_run_optimizer(args, model)
    if get_is_master():
        warn_of_small_disk(checkpoints.path, optimizer, get_world_size())
    state = load_state(args, model, optimizer, scheduler, checkpoints, mesh)
    if state.step == 0:
        check_model_value_range(model, range=MAX_WEIGHT, std=MAX_STD, zero_init=zero_at_start())
    loader = run_together(lambda: build_dataloader_from_args(args.data, state.data_loader_state))
    run_on_rank_0(lambda: save_run_record(args, given, state.step))

    batches = resources.enter_context(loader)
    trainer = Trainer(args, model, optimizer, state, batches, mesh, device)
    resources.callback(trainer.free_graphs)
    log_on_rank_0(format_summary(trainer, get_world_size()))
    for warning in train_warnings(args):
        log_on_rank_0(warning, level=WARNING)
    progress = Progress(trainer, flops_by_loops)
    facts = {
        "model/parameters": get_num_params(model),
        "model/layout": format_layout(model.inference_layout, model.layout_plan.random_loops),
        "model/flops_per_token": mean_flops,
        "environment/versions": format_versions(),
    }
    metric_logger = MetricLogger(metrics_path(args), args, resume_step=state.step, facts=facts)
    metrics = run_together(lambda: resources.enter_context(metric_logger))
    profiler = resources.enter_context(maybe_run_profiler(args.dump_dir, model, args.profiling))
    log_micro_batches(trainer, metrics)
    log_probes(trainer, metrics)
    watchdog = resources.enter_context(HangWatchdog(args.distributed.timeout_minutes))
    return Run(trainer, checkpoints, metrics, progress, profiler, watchdog, preemption, validator)


def setup_process(args: TrainArgs) -> PreemptionFlag:
    """Set up the log, the signal handlers, the environment and the process group."""
    init_logger(Path(args.dump_dir, "train.log"))
    preemption = PreemptionFlag()
    init_signal_handler(preemption.set)
    setup_env(args.env)
    setup_torch_distributed(args.distributed)
    seed_everything(args.seed)
    return preemption


def build_model(
    args: TrainArgs, mesh: DeviceMesh | None, device: torch.device, model: LoopedTransformer
) -> None:
    """Parallelize `model`, which is on meta, allocate it on `device` and initialize it, in place.

    parallelize_model checkpoints single layers; only the model can checkpoint whole loops.
    """
    model.checkpoint_loops = args.distributed.activation_checkpointing == "loop"
    model.reshard_between_loops = args.distributed.reshard_between_loops
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


def build_run_optimizer(args: TrainArgs, model: LoopedTransformer) -> tuple[Optimizer, ScheduledLR]:
    """Build the optimizer and its schedule. They follow T where it varies."""
    used_rows: dict[torch.Tensor, Callable[[], int]] = {}
    if model.rho is not None and model.loop_plan.shares() != {args.model.loop_count: 1.0}:
        used_rows[model.rho] = lambda: model.n_loops
    changes = [start for start in model.loop_plan.starts(args.steps) if start > 0]
    return build_optimizer(model, args.optim, args.steps, restarts=changes, used_rows=used_rows)


def zero_at_start() -> list[str]:
    """Return the name suffixes of weights that are initialized to zero."""
    mixers = set(MIXERS.values())
    return [
        "rho",
        "exit_gate.weight",
        "exit_gate.bias",
        *(f"{m.module_name}.{name}" for m in mixers for name in m.zero_at_start),
    ]


def load_state(
    args: TrainArgs,
    model: LoopedTransformer,
    optimizer: Optimizer,
    scheduler: ScheduledLR,
    checkpoints: CheckpointManager,
    mesh: DeviceMesh | None,
) -> TrainState:
    """Load the newest checkpoint into `model` and `optimizer`, and return the train state.

    A new run loads the weights of checkpoint.init_ckpt_path, if set.
    """
    loader_state = init_dataloader_state_from_args(args.data, *get_dp_rank_and_degree(mesh))
    state = TrainState(0, 0, loader_state, scheduler)
    loaded = checkpoints.load(model, optimizer, state, mesh, config=args)
    if loaded is None and (path := args.checkpoint.init_ckpt_path) is not None:
        source = run_on_rank_0(lambda: find_checkpoint(path, INIT_OPTION))
        log_on_rank_0("initial weights: %s", source)
        stored = load_initial_weights(str(source), model, ZERO_IF_MISSING, RESIZED)
        state.n_gates = min(stored.get("rho", (0,))[0], args.model.loop_count)
        for difference in run_on_rank_0(lambda: find_init_differences(args, source)):
            message = "model differs from checkpoint.init_ckpt_path: %s"
            log_on_rank_0(message, difference, level=WARNING)
    elif loaded is not None:
        log_on_rank_0("resumed from %s, step %d", loaded.path, loaded.step)
        for difference in loaded.differences:
            if difference.startswith(f"{TOKENIZER_SHA256}: "):
                check_same_tokenizer(args, loaded.path, difference)
                continue
            log_on_rank_0("config changed since the checkpoint: %s", difference, level=WARNING)
    return state


def find_init_differences(args: TrainArgs, source: Path) -> list[str]:
    """List options of the model and tokenizer that differ from the run of the weights in `source`.

    The shapes may fit nevertheless, for example with another rope_theta. The list is empty if the
    weights have no params.json of ours or of Lingua.
    """
    file = (source if source.is_dir() else source.parent) / CONFIG_NAME
    if not file.is_file():
        return []
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if not {"model", "data"} <= saved.keys():
            return []
        model = dataclass_from_dict(LoopedTransformerArgs, saved["model"], strict=False)
    except ValueError as error:  # also a UserError
        raise UserError(f"checkpoint.init_ckpt_path: {file} is not readable: {error}") from None
    tokenizer = dataclass_to_dict(args.data.tokenizer)
    changes = diff_configs(
        {
            "model": dataclass_to_dict(model),
            "data.tokenizer": saved["data"].get("tokenizer", tokenizer),
        },
        {"model": dataclass_to_dict(args.model), "data.tokenizer": tokenizer},
    )
    loops = ("schedule", "sample", "bptt", "loss", "entropy")
    of_training = (f"model.loop_{name}:" for name in loops)
    ignored = ("model.seed:", "model.max_seqlen:", *of_training, *SHA256_WAS_UNKNOWN)
    return [c for c in changes if not c.startswith(ignored)]


def check_same_tokenizer(args: TrainArgs, checkpoint: Path, difference: str) -> None:
    """Raise UserError unless the checkpoint is older than the recorded sha256."""
    is_file = args.data.tokenizer.sha256 is not None  # else data.tokenizer.name differs, too
    if is_file and not difference.startswith(SHA256_WAS_UNKNOWN):
        raise UserError(
            f"data.tokenizer.path={args.data.tokenizer.path}: the file is not the tokenizer of "
            f"{checkpoint} ({difference}); restore it, or start a new run"
        )


def save_run_record(args: TrainArgs, given: TrainArgs, step: int) -> None:
    """Write config.yaml, base_config.yaml and the code. A changed config is kept under `step`.

    A checkpoint.path that was derived is null: with another dump_dir, config.yaml starts a new run.
    """
    folder = Path(args.dump_dir)
    args = replace(args, checkpoint=replace(args.checkpoint, path=given.checkpoint.path))
    if not (folder / "base_config.yaml").exists():
        dump_config(given, folder / "base_config.yaml", log_config=False)
    config = folder / "config.yaml"
    before = config.read_bytes() if config.exists() else None
    dump_config(args, config, log_config=False)
    if before is not None and before != config.read_bytes():
        (folder / f"config.before_step_{step}.yaml").write_bytes(before)
    root = Path(__file__).resolve().parents[2]
    if not (folder / "code").exists() and (root / "pyproject.toml").exists():
        snapshot_code(root, folder / "code", folder.resolve())
        if not (folder / CODE_VERSION).exists():  # stool writes its own
            write_atomic(folder / CODE_VERSION, version_record(root))


# ---- the command


def validate_before_submit(args: TrainArgs, world_size: int) -> None:
    """Check `args` for stool, before it writes or submits anything, and log warnings."""
    for warning in train_warnings(validate_train_args(args, world_size=world_size)):
        logger.warning(warning)


def is_done(args: TrainArgs, world_size: int) -> bool:
    """Return whether stool may leave this run out, because an earlier launch finished it."""
    return is_finished(validate_train_args(args, world_size=world_size), quiet=True)


def input_paths(args: TrainArgs) -> dict[str, str | Path | None]:
    """Map options to the paths that the run reads; stool's override leaves them in place."""
    root = args.data.root_dir or ""
    return {
        "checkpoint.init_ckpt_path": args.checkpoint.init_ckpt_path,
        "data.tokenizer.path": args.data.tokenizer.path,
        "data.root_dir": None if args.data.sources else args.data.root_dir,
        **{f"data.sources.{source}": Path(root, source) for source in args.data.sources},
    }


def main(argv: list[str]) -> None:
    args = parse_args(TrainArgs, argv, prog="python -m apps.LT2.train", doc=__doc__)
    try:
        train(args)
    except KeyboardInterrupt:
        if args.dump_dir and get_is_master():
            print(how_to_resume(args, argv), file=sys.stderr, flush=True)
        raise


def how_to_resume(args: TrainArgs, argv: list[str]) -> str:
    """Return two lines: the newest checkpoint, and the command that resumes from it."""
    dump_dir = Path(args.dump_dir)
    path = args.checkpoint.path or str(dump_dir / "checkpoints")
    newest = None
    with suppress(UserError):  # all are damaged
        newest = CheckpointManager(replace(args.checkpoint, path=path)).get_last_step_path()
    script = dump_dir / SUBMIT_SCRIPT
    if os.environ.get("DUMP_DIR") == str(dump_dir.absolute()) and script.exists():
        command = ["sbatch" if "SLURM_JOB_ID" in os.environ else "bash", str(script)]
    else:
        command = [*launcher(sys.orig_argv[0]), "-m", "apps.LT2.train", *argv]
    state = f"newest checkpoint: {newest}" if newest else "no checkpoint is saved"
    verb = "resume" if newest else "start over"
    return redact(f"{state}\nto {verb}: {shlex.join(command)}")


if __name__ == "__main__":
    run_cli(main)
