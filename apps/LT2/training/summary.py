"""Summarize a run at its start, for the log."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress
from pathlib import Path

import torch

from apps.LT2.flops import count_parameters
from apps.LT2.pattern import format_layout
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.trainer import Trainer
from lingua.data import ROOT_SOURCE
from lingua.dataloader.args import DataArgs
from lingua.dataloader.synthetic.args import build_task, options_of
from lingua.parallel.args import resolve_dtype
from lingua.tokenizer import find_tokenizer_file

MAX_SOURCES = 4  # listed by name
LABEL_WIDTH = 9
PACKAGES = ("torch", "triton", "flash-linear-attention")  # that compute


def format_summary(trainer: Trainer, world_size: int) -> str:
    """Return a table of the model, its layout, the data, the devices and the steps."""
    args, model, step = trainer.args, trainer.model, trainer.state.step
    count = count_parameters(model)
    shares = {"layers": count.body, "embeddings": count.embedding, "gates": count.gates}
    shape = f"{args.model.n_layers} layers x {args.model.loop_count} loops, dim {args.model.dim}"
    data, n_tokens = args.data, trainer.tokens_per_step
    done = f", {step:,} of them done" if step else ""
    rows = [
        ("model", f"{shape}, {count.total:,} parameters"),
        ("", ", ".join(f"{n:,} in {name}" for name, n in shares.items() if n)),
        ("layout", format_layout(model.inference_layout, model.layout_plan.random_loops)),
        *([("loops", str(model.loop_plan))] if model.loop_plan.varies else []),
        ("data", _sources(data)),
        ("", f"{_tokenizer(data)}vocabulary {args.model.vocab_size:,}"),
        ("devices", _devices(trainer, world_size)),
        ("batch", f"{n_tokens:,} tokens per step: {_factors(args)}"),
        ("steps", f"{args.steps:,} ({args.steps * n_tokens:,} tokens){done}"),
        ("config", str(Path(args.dump_dir, "config.yaml"))),
    ]
    margin = " " * LABEL_WIDTH
    lines = [label.ljust(LABEL_WIDTH) + text.replace("\n", "\n" + margin) for label, text in rows]
    return "\n".join([f"run {args.name}", *lines])


def format_versions() -> str:
    """Return the versions of Python and of PACKAGES, as far as they are installed."""
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(versions)


def _tokenizer(data: DataArgs) -> str:
    if data.task is not None:
        return ""
    name, path = data.tokenizer.name, data.tokenizer.path
    return f"tokenizer {find_tokenizer_file(name, path) or name}, "


def _sources(data: DataArgs) -> str:
    if data.task is not None:
        task = options_of(build_task(data.task))
        return ", ".join(f"{name}={value}" for name, value in task.items() if value is not None)
    if list(data.sources) == [ROOT_SOURCE]:
        return str(data.root_dir)
    total = sum(data.sources.values())
    listed = [f"{name} ({weight / total:.0%})" for name, weight in data.sources.items()]
    if len(listed) > MAX_SOURCES:
        listed[MAX_SOURCES - 1 :] = [f"{len(listed) - MAX_SOURCES + 1} more"]
    return f"{', '.join(listed)} in {data.root_dir}"


def _devices(trainer: Trainer, world_size: int) -> str:
    args, device = trainer.args, trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = str(resolve_dtype(args.distributed.model_dtype, device.type)).removeprefix("torch.")
    degrees = {n: getattr(args.distributed, n) for n in ("dp_replicate", "dp_shard", "tp_size")}
    parts = [f"{world_size} x {name}", *(f"{n}={k}" for n, k in degrees.items() if k > 1), dtype]
    if world_size > 1:
        parts.insert(1, args.distributed.fsdp_type)
    if trainer.graphs is not None:
        parts.append("steps as CUDA graphs")
    if args.distributed.compile:
        parts.append("compiled: the first step may take minutes")
    return ", ".join(parts)


def _factors(args: TrainArgs) -> str:
    n_ranks = args.distributed.dp_replicate * args.distributed.dp_shard
    factors = {"micro-batches": args.grad_acc_steps, "ranks": n_ranks}
    shown = [f"{n} {name}" for name, n in factors.items() if n > 1]
    return " x ".join([f"{args.data.batch_size} sequences", *shown, f"{args.data.seq_len} tokens"])
