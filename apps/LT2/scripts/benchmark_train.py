"""Measure training steps of recipes: tokens/s, MFU, memory, graph breaks, kernels.

    python -m apps.LT2.scripts.benchmark_train apps/LT2/configs/600M/*.yaml --steps 20 \\
        data.root_dir=data "data.sources={local: 1.0}" grad_acc_steps=1
    torchrun --nproc-per-node 2 -m apps.LT2.scripts.benchmark_train RECIPE.yaml --profile \\
        --vary distributed.activation_checkpointing=none,loop --vary model.loop_count=1,4 \\
        distributed.fsdp_type=full_shard

Recipes run sequentially in one process, on the data of their configs and with the given overrides.
Tuning and compilation happen in the warm-up steps, which are not timed. A recipe that runs out of
memory is reported in its row. --profile traces one more step of each recipe, sums device time by
kind of kernel and counts collectives. Memory is the maximum over ranks. The last line is the whole
result as JSON. `lt2 benchmark report` reports the results of one or several files.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from apps.LT2.batch import to_device
from apps.LT2.benchmark.timing import environment, release_memory, synchronize
from apps.LT2.flops import count_parameters, step_flops_per_token
from apps.LT2.parallel import set_gradient_sync
from apps.LT2.train import build_model, build_run_optimizer
from apps.LT2.training.args import TrainArgs, validate_train_args
from apps.LT2.training.step_graph import why_no_step_graph
from apps.LT2.training.trainer import Trainer, TrainState
from apps.LT2.training.unused_options import unused_options
from apps.LT2.transformer import RESIZED, ZERO_IF_MISSING, build_on_meta
from lingua.args import parse_args
from lingua.checkpoint import INIT_OPTION, find_checkpoint
from lingua.checkpointing.weights import load_initial_weights
from lingua.config.cli import OVERRIDE, OneLineParser
from lingua.data import build_dataloader_from_args, init_dataloader_state_from_args
from lingua.distributed import (
    dist_max,
    get_device,
    get_device_mesh,
    get_dp_rank_and_degree,
    get_is_master,
    get_world_size,
    run_on_rank_0,
    setup_env,
    setup_torch_distributed,
)
from lingua.errors import UserError, run_cli
from lingua.metrics import GIB, peak_flops
from lingua.parallel.args import resolve_dtype
from lingua.rng import seed_everything

# Kind of kernel -> parts of its names. The first match counts.
KERNEL_KINDS = (
    ("communication", ("nccl", "c10d", "gloo")),
    # triton_: Inductor's, whose names contain any operator
    ("norms and gates", ("triton_", "_gated_norm", "layer_norm", "gammabeta")),
    ("short convolutions", ("_conv_",)),
    ("softmax attention", ("flash", "fmha", "cudnn", "attention", "attn")),
    ("lightning indexer", ("_score_kernel", "_select_kernel", "_compare_kernel", "_index_d")),
    (
        "selected attention",
        ("_attend_kernel", "_dq_kernel", "_dkv_kernel", "_choose_kernel", "_unite_kernel"),
    ),
    ("matrix products", ("nvjet", "gemm", "cutlass", "splitk", "cublas", "xmma", "::mm", "::bmm")),
    (
        "recurrences",
        ("chunk_", "recompute_w_u", "solve_tril", "_cumsum", "merge_16x16", "kkt", "_input_grad"),
    ),
    ("optimizer and gradient norm", ("multi_tensor", "adam", "foreach", "norm")),
    ("copies and fills", ("memcpy", "memset", "copy", "cat", "fill")),
)


@dataclass
class Row:
    recipe: str
    body_parameters: int = 0
    tokens_per_step: int = 0
    tokens_per_s: float = 0.0  # median over the timed steps
    quartiles: tuple[float, float] = (0.0, 0.0)
    mfu: float | None = None
    peak_gib: float = 0.0
    # of a micro-batch, without gathered weights: kept by the forward for the backward, and the peak
    # of both, including recomputation and gradients
    activations_gib: float = 0.0
    peak_activations_gib: float = 0.0
    n_ranks: int = 1
    first_step_s: float = 0.0  # with tuning and compilation
    graph_breaks: int = 0  # in compiled blocks
    late_graphs: int = 0  # compiled in the timed steps
    cuda_graphs: int = 0  # captured steps; 0 = all of them ran eagerly
    mean_loops: float = 0.0  # of the timed steps
    compiled: bool = False
    first_loss: float = 0.0
    last_loss: float = 0.0
    grad_norm: float = 0.0  # of the last step; finite, or the run would have stopped
    seq_len: int = 0
    batch_size: int = 0  # of a micro-batch on a rank
    problem: str = ""
    kernel_ms: dict[str, float] = field(default_factory=dict)
    top_kernels_ms: dict[str, float] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)  # of the traced step


def measure(args: TrainArgs, row: Row, warmup: int, steps: int, profile: bool) -> None:
    """Train `steps` steps and fill in `row`. The first `warmup` steps are not timed."""
    device = get_device()
    counters.clear()
    seed_everything(args.seed)
    mesh = get_device_mesh(args.distributed)
    model = build_on_meta(args.model)
    flops_per_token = {  # before TP splits the heads
        T: step_flops_per_token(model, args.data.seq_len, T) for T in model.loop_plan.shares()
    }
    build_model(args, mesh, device, model)
    if (path := args.checkpoint.init_ckpt_path) is not None:
        source = run_on_rank_0(lambda: find_checkpoint(path, INIT_OPTION))
        load_initial_weights(str(source), model, ZERO_IF_MISSING, RESIZED)
    optimizer, scheduler = build_run_optimizer(args, model)
    dp_rank, dp_degree = get_dp_rank_and_degree(mesh)
    loader_state = init_dataloader_state_from_args(args.data, dp_rank, dp_degree)
    state = TrainState(0, 0, loader_state, scheduler)
    row.n_ranks = get_world_size()
    row.body_parameters = count_parameters(model).body
    rows_per_step = args.data.batch_size * args.grad_acc_steps * dp_degree
    row.tokens_per_step = rows_per_step * args.data.seq_len
    row.compiled = args.distributed.compile
    with ExitStack() as resources:
        loader = build_dataloader_from_args(args.data, state.data_loader_state)
        batches = resources.enter_context(loader)
        trainer = Trainer(args, model, optimizer, state, batches, mesh, device)
        resources.callback(trainer.free_graphs)
        seconds, loops, n_graphs = [], [], 0
        began = time.perf_counter()
        for step in range(steps):
            if step == warmup:
                n_graphs = counters["stats"]["unique_graphs"]
            if step == 1 and device.type == "cuda":  # tuning may take more memory than a step
                torch.cuda.reset_peak_memory_stats()
            # As in training, it waits for the gradient norm, and not for the update.
            result = trainer.step()
            ended = time.perf_counter()
            seconds.append(ended - began)
            began = ended
            row.grad_norm = result.grad_norm
            loops.append(result.n_loops)
        row.late_graphs = counters["stats"]["unique_graphs"] - n_graphs
        row.cuda_graphs = 0 if trainer.graphs is None else len(trainer.graphs.graphs)
        row.mean_loops = statistics.fmean(loops[warmup:])
        if device.type == "cuda":  # other devices do not count memory
            row.peak_gib = dist_max(torch.cuda.max_memory_allocated() / GIB).item()
        if profile:
            row.kernel_ms, row.top_kernels_ms, row.collectives = profile_step(trainer)
        if device.type == "cuda":
            trainer.free_graphs()  # they hold memory
            kept, peak = activation_gib(trainer)
            row.activations_gib = dist_max(kept).item()
            row.peak_activations_gib = dist_max(peak).item()
    row.first_step_s = seconds[0]
    rates = [row.tokens_per_step / s for s in seconds[warmup:]]
    low, row.tokens_per_s, high = statistics.quantiles(rates, n=4)
    row.quartiles = (low, high)
    dtype = resolve_dtype(args.distributed.model_dtype, device.type)
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(), dtype)
        timed = zip(rates, loops[warmup:], strict=True)
        flops = statistics.median(rate * flops_per_token[T] for rate, T in timed) / row.n_ranks
        row.mfu = None if peak is None else flops / peak
    row.graph_breaks = sum(counters["graph_break"].values())
    row.first_loss, row.last_loss = (state.losses[i].item() for i in (0, steps - 1))


def activation_gib(trainer: Trainer) -> tuple[float, float]:
    """Measure activations of a micro-batch: kept by the forward for the backward, and the peak.

    Both exclude memory that was allocated before.
    """
    views, trainer.state.data_loader_state = next(trainer.batches)
    batch = to_device(views, trainer.args.data.doc_mask, trainer.device)
    trainer.model.begin_step(None)  # the largest number of loops
    set_gradient_sync(trainer.model, True)
    with torch.no_grad():
        trainer.model(*batch)  # gather the weights
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = trainer.model(*batch)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    trainer.optimizer.zero_grad()
    return kept / GIB, peak / GIB


# Names of NCCL kernels, and of gloo collectives on a CPU.
COLLECTIVE = re.compile(r"ncclDevKernel_([A-Za-z]+)|c10d::_?([a-z_]+?)_?$")


def profile_step(trainer: Trainer) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Trace one step. Return its device time in ms by kind, of the ten longest kernels, and the
    number of collectives by name."""
    on_cuda = trainer.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    activity = kinds.CUDA if on_cuda else kinds.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        trainer.step()
        synchronize(trainer.device)
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    collectives: Counter[str] = Counter()
    for event in profiler.key_averages():
        if found := COLLECTIVE.match(event.key):
            collectives[found[1] or found[2]] += event.count
        ms = (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1000
        if not ms:
            continue
        by_kind[kernel_kind(event.key)] += ms
        by_name[event.key[:80]] += ms
    return dict(by_kind.most_common()), dict(by_name.most_common(10)), dict(collectives)


def kernel_kind(name: str) -> str:
    lower = name.lower()
    for kind, parts in KERNEL_KINDS:
        if any(part in lower for part in parts):
            return kind
    return "other"


def read_recipe(path: str, overrides: list[str]) -> TrainArgs:
    options = [f"config={path}", "dump_dir=unused", *overrides]
    given = parse_args(TrainArgs, options)
    try:
        return validate_train_args(given)
    except UserError as error:  # the message does not name the recipe
        raise UserError(f"{path}: {error}") from None


def variants(varied: list[str]) -> list[list[str]]:
    """Return the overrides of every run: all combinations of the values in "key=a,b" options."""
    choices = []
    for option in varied:
        key, equals, values = option.partition("=")
        if not equals or not values:
            raise UserError(f"--vary {option}: must be key=value,value")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [list(combination) for combination in product(*choices)]


def print_on_rank_0(line: str) -> None:
    if get_is_master():
        print(line, flush=True)


# Columns after the name -> width.
COLUMNS = {
    "body": 8,
    "tokens/s": 9,
    "quartiles": 15,
    "MFU": 6,
    "memory": 9,
    "kept": 9,
    "peak": 9,
    "1st step": 8,
    "breaks": 6,
    "first loss": 10,
    "last loss": 10,
    "grad norm": 9,
}


def legend(n_ranks: int) -> str:
    return (
        f"ranks: {n_ranks}; body: parameters without embeddings; tokens/s: all ranks together, "
        "median of the timed steps; memory: maximum over ranks\n"
        "kept: activations that the forward of a micro-batch keeps for its backward; peak: peak "
        "of both; 1st step: with tuning and compilation; breaks: graph breaks in compiled blocks"
    )


def format_line(name: str, width: int, cells: Iterable[str]) -> str:
    columns = (cell.rjust(n) for cell, n in zip(cells, COLUMNS.values(), strict=True))
    return "  ".join([name.ljust(width), *columns])


def format_row(row: Row, width: int) -> str:
    if row.problem:
        return f"{row.recipe.ljust(width)}  {row.problem}"
    low, high = row.quartiles
    gib = (row.peak_gib, row.activations_gib, row.peak_activations_gib)
    cells = (
        f"{row.body_parameters / 1e6:.1f}M",
        f"{row.tokens_per_s:.0f}",
        f"{low:.0f}-{high:.0f}",
        "-" if row.mfu is None else f"{100 * row.mfu:.1f}%",
        *(f"{n:.2f} GiB" if row.peak_gib else "-" for n in gib),
        f"{row.first_step_s:.1f} s",
        str(row.graph_breaks) if row.compiled else "eager",
        *(f"{n:.3f}" for n in (row.first_loss, row.last_loss, row.grad_norm)),
    )
    return format_line(row.recipe, width, cells)


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.benchmark_train",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("recipes", nargs="+", metavar="CONFIG.yaml or key=value")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, including warm-up")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--profile", action="store_true", help="trace one more step of each recipe")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="key=a,b", help="one run per value"
    )
    given = parser.parse_intermixed_args(argv)
    if given.warmup < 1 or given.steps < given.warmup + 2:
        raise UserError(f"--steps {given.steps} leaves fewer than 2 after --warmup {given.warmup}")
    # Also accept config=FILE, as in training.
    named = [arg.removeprefix("config=") for arg in given.recipes]
    paths = [arg for arg in named if not OVERRIDE.match(arg)]
    overrides = [arg for arg in named if OVERRIDE.match(arg)]
    runs = [  # read all of them before any runs
        (" ".join([Path(path).stem, *changes]), read_recipe(path, [*overrides, *changes]))
        for path, changes in product(paths, variants(given.vary))
    ]
    if not runs:
        raise UserError("no recipe is given: name one or more CONFIG.yaml")

    setup_env(runs[0][1].env)
    setup_torch_distributed(runs[0][1].distributed)
    for name, args in runs:
        warnings = list(unused_options(args.model).values())
        if args.distributed.cuda_graph and (reason := why_no_step_graph(args)) is not None:
            warnings.append(f"distributed.cuda_graph=true has no effect with {reason}")
        for warning in warnings:
            print_on_rank_0(f"{name}: {warning}")
    result = environment(get_device()) | {
        "argv": argv,
        "overrides": overrides,
        "steps": given.steps,
        "warmup": given.warmup,
    }
    width = max(len("recipe"), *(len(name) for name, _ in runs))
    print_on_rank_0(legend(get_world_size()))
    print_on_rank_0(format_line("recipe", width, COLUMNS))
    rows = []
    for name, args in runs:
        data = args.data
        rows.append(row := Row(name, seq_len=data.seq_len, batch_size=data.batch_size))
        try:
            measure(args, row, given.warmup, given.steps, given.profile)
        except torch.OutOfMemoryError as error:
            row.problem = f"out of memory: {str(error).splitlines()[0]}"
        except (FloatingPointError, UserError) as error:
            row.problem = str(error)
        torch.compiler.reset()
        release_memory()
        print_on_rank_0(format_row(row, width))
        if args.model.loop_plan().varies:
            print_on_rank_0(f"    {row.mean_loops:9.2f}     mean loops of the timed steps")
        if row.late_graphs:
            print_on_rank_0(f"    {row.late_graphs:9d}     graphs compiled in the timed steps")
        for kind, ms in row.kernel_ms.items():
            print_on_rank_0(f"    {ms:9.2f} ms  {kind}")
        for name, count in row.collectives.items():
            print_on_rank_0(f"    {count:9d}     {name}")
    print_on_rank_0(json.dumps(result | {"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    run_cli(main)
