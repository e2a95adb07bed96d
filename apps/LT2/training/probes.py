"""What a run can tell beside its record of each step: losses inside a step, and probes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from apps.LT2.batch import Batch
from apps.LT2.mixers import MIXERS
from apps.LT2.parallel import set_gradient_sync
from apps.LT2.training.trainer import Trainer, every_n_steps
from apps.LT2.transformer import LoopedTransformer
from lingua.distributed import (
    clip_grad_norm_,
    dist_mean,
    dist_mean_dict,
    get_dp_rank_and_degree,
    run_on_rank_0,
    sync_replicated_grads,
)
from lingua.files.jsonl_log import is_recorded, repair_jsonl
from lingua.metrics import MetricLogger
from lingua.probe import Probe


def log_micro_batches(trainer: Trainer, metrics: MetricLogger, acc_freq: int | None) -> None:
    """With logging.acc_freq, logged steps have a record each acc_freq micro-batches."""
    if acc_freq is None:
        return

    def log(loss: Tensor) -> None:
        state = trainer.state
        is_logged = (state.step + 1) % trainer.args.logging.freq == 0
        if is_logged and state.acc_step and state.acc_step % acc_freq == 0:
            mean = dist_mean(loss).item()
            record = {"global_step": state.step, "acc_step": state.acc_step, "loss/out": mean}
            metrics.log(record)

    trainer.after_micro_batch = log


def probe_now_and_then(trainer: Trainer, metrics: MetricLogger) -> None:
    """With probe_freq, one pass of its own before such a step: statistics of every linear layer,
    and a record of what apps.LT2.training.probes measures."""
    freq, state = trainer.args.probe_freq, trainer.state
    if freq is None:
        return
    rank, _ = get_dp_rank_and_degree(trainer.mesh)
    # One rank in 128 writes; the others take part, since a sharded model needs them.
    file = Path(trainer.args.dump_dir, "probe", f"probe.{rank}.jsonl") if rank % 128 == 0 else None
    probe = Probe(trainer.model, file)
    # The run that saved the step that this one goes on from may have probed the next already.
    first_key = "layers/grad_norm/0"
    is_done = run_on_rank_0(lambda: is_recorded(metrics.path, state.step, first_key))
    done_step = state.step if is_done else None
    if file is not None:
        repair_jsonl(file, state.step if is_done else state.step - 1)

    def look(batch: Batch) -> None:
        if not every_n_steps(state, freq, acc_step=0) or state.step == done_step:
            return
        x, target, cu_seqlens = batch
        if cu_seqlens is None:  # half the rows: a pass in eager mode takes more memory
            n_rows = max(1, x.shape[0] // 2)
            x, target = x[:n_rows], target[:n_rows]
        probe.metadata = {"it": state.step, "global_step": state.step, "loop": "lt2"}
        numbers = probed_pass(trainer.model, probe, (x, target, cu_seqlens), trainer.mesh)
        trainer.optimizer.zero_grad()
        metrics.log({"global_step": state.step, "acc_step": 0, **numbers})

    trainer.before_micro_batch = look


def probed_pass(
    model: LoopedTransformer, probe: Probe, batch: Batch, mesh: DeviceMesh | None
) -> dict[str, float]:
    """One forward and backward under `probe`, a collective; gradients are left in `.grad`."""
    set_gradient_sync(model, True)
    with probe:
        with residual_stream(model) as h_by_loop:
            loss = model(*batch)
        loss.backward()
    sync_replicated_grads(model, mesh)
    return loop_numbers(model, probe, h_by_loop) | layer_numbers(model)


@contextmanager
def residual_stream(model: LoopedTransformer) -> Iterator[list[Tensor]]:
    """h before loop 0 and after each loop, of the forward inside (not of what its backward
    recomputes)."""
    seen: list[Tensor] = []

    def look(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())

    # Each loop enters at the first layer, and the last one leaves to the final norm.
    handles = [m.register_forward_pre_hook(look) for m in (model.layers[0], model.norm)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def loop_numbers(
    model: LoopedTransformer, probe: Probe, h_by_loop: list[Tensor]
) -> dict[str, float]:
    n_loops = len(model.layout)
    assert len(h_by_loop) == n_loops + 1, f"{n_loops} loops, {len(h_by_loop)} residual streams"
    means: dict[str, Tensor | float] = {f"h/{i}": _mean_square(h) for i, h in enumerate(h_by_loop)}
    for loop, (u, h) in enumerate(zip(h_by_loop[:-1], h_by_loop[1:], strict=True)):
        means[f"update/{loop}"] = _mean_square(h.float() - u.float())
    masses = first_token_masses(model, probe)
    means |= {f"mass/{loop}": sum(m) / len(m) for loop, m in enumerate(masses) if m}
    of = dist_mean_dict(means)

    numbers = {}
    for loop in range(n_loops):
        numbers[f"loops/residual_rms/{loop}"] = of[f"h/{loop + 1}"] ** 0.5
        numbers[f"loops/update_norm/{loop}"] = (of[f"update/{loop}"] / of[f"h/{loop}"]) ** 0.5
        if model.rho is not None:
            numbers[f"loops/rho/{loop}"] = model.rho[loop].detach().abs().mean().item()
        if masses[loop]:
            numbers[f"loops/first_token_mass/{loop}"] = of[f"mass/{loop}"]
    return numbers


def first_token_masses(model: LoopedTransformer, probe: Probe) -> list[list[float]]:
    """For each loop, the mass in each of its layers that logged one."""
    masses: list[list[float]] = [[] for _ in model.layout]
    for layer, column in enumerate(zip(*model.layout, strict=True)):
        names = [MIXERS[spec.mixer].module_name for spec in column]
        for name in dict.fromkeys(names):
            loops = [loop for loop, n in enumerate(names) if n == name]
            calls = probe.calls(f"layers.{layer}.{name}", "first_token_mass")
            if calls:
                for loop, stats in zip(loops, calls, strict=True):
                    masses[loop].append(stats["mean"])
    return masses


def layer_numbers(model: LoopedTransformer) -> dict[str, float]:
    norms = torch.stack([clip_grad_norm_(layer, None) for layer in model.layers])
    return {f"layers/grad_norm/{i}": norm for i, norm in enumerate(norms.tolist())}


def _mean_square(x: Tensor) -> Tensor:
    return x.float().square().mean()
