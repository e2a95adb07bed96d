"""Optional records of a run: the loss of single micro-batches, and statistics of layers and loops.

Metric keys of a probed step, per layer or per loop i:

    layers/grad_norm/i         gradient norm of the layer
    loops/residual_rms/i       RMS of the residual stream after the loop
    loops/residual_growth/i    the same, relative to the RMS before the loop
    loops/update_norm/i        norm of what the loop adds to the stream, relative to the stream
    loops/rho/i                mean |rho| of the residual gate
    loops/first_token_mass/i   attention probability on the first token, mean over softmax layers
    depth/first_token_mass/i   the same of one layer; i counts the layers over all loops
"""

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
from lingua.dataloader.packing import NO_TARGET
from lingua.distributed import (
    clip_grad_norm_,
    dist_mean,
    dist_mean_dict,
    get_dp_rank_and_degree,
    get_world_size,
    run_on_rank_0,
    sync_replicated_grads,
)
from lingua.files.jsonl_log import is_recorded, repair_jsonl
from lingua.metrics import MetricLogger
from lingua.probe import Probe

PROBED_RANKS = 128  # one rank in so many writes a probe file


def log_micro_batches(trainer: Trainer, metrics: MetricLogger) -> None:
    """Log the loss of every logging.acc_freq-th micro-batch in logged steps."""
    state, logging = trainer.state, trainer.args.logging
    acc_freq = logging.acc_freq
    if acc_freq is None:
        return

    def log(nats: Tensor, n_targets: int) -> None:
        is_logged = (state.step + 1) % logging.freq == 0
        if is_logged and state.acc_step and state.acc_step % acc_freq == 0:
            mean = (dist_mean(nats) / dist_mean(float(n_targets))).item()
            record = {"global_step": state.step, "acc_step": state.acc_step, "loss/out": mean}
            metrics.log(record)

    trainer.after_micro_batch = log


def log_probes(trainer: Trainer, metrics: MetricLogger) -> None:
    """Run a separate probed pass before every probe_freq-th step, and log its statistics."""
    freq, state = trainer.args.probe_freq, trainer.state
    if freq is None:
        return
    rank, _ = get_dp_rank_and_degree(trainer.mesh)
    is_writer = rank % PROBED_RANKS == 0  # all ranks run the pass, since the model is sharded
    file = Path(trainer.args.dump_dir, "probe", f"probe.{rank}.jsonl") if is_writer else None
    probe = Probe(trainer.model, file)
    # The run that saved this checkpoint may have probed its next step already.
    first_key = "layers/grad_norm/0"
    is_done = run_on_rank_0(lambda: is_recorded(metrics.path, state.step, first_key))
    done_step = state.step if is_done else None
    if file is not None:
        repair_jsonl(file, state.step if is_done else state.step - 1)

    def log(batch: Batch) -> None:
        if not every_n_steps(state, freq) or state.step == done_step:
            return
        x, target, cu_seqlens = batch
        if cu_seqlens is None:  # half of the rows: a pass in eager mode takes more memory
            n_rows = max(1, x.shape[0] // 2)
            x, target = x[:n_rows], target[:n_rows]
        probe.metadata = {"it": state.step, "global_step": state.step, "loop": "lt2"}
        stats = run_probed_pass(trainer.model, probe, (x, target, cu_seqlens), trainer.mesh)
        trainer.optimizer.zero_grad()
        metrics.log({"global_step": state.step, "acc_step": 0, **stats})

    trainer.before_step = log


def run_probed_pass(
    model: LoopedTransformer, probe: Probe, batch: Batch, mesh: DeviceMesh | None
) -> dict[str, float]:
    """Run forward and backward under `probe`, and return the statistics by metric key.

    A collective. The gradients stay in `.grad`.
    """
    set_gradient_sync(model, True)
    # Ranks may have different numbers of targets. A mean of 0 on all ranks would divide by 0.
    n_targets = dist_mean((batch[1] != NO_TARGET).sum()).clamp(min=1 / get_world_size()).float()
    model.n_answers = None  # of another batch; the accuracy would run the norm on answers only
    with probe:
        with recorded_residual_stream(model) as h_by_loop:
            loss = model(*batch, n_targets)
        loss.backward()
    sync_replicated_grads(model, mesh)
    return loop_stats(model, probe, h_by_loop) | layer_stats(model)


@contextmanager
def recorded_residual_stream(model: LoopedTransformer) -> Iterator[list[Tensor]]:
    """Record h before loop 0 and after each loop, (n_loops + 1) tensors of shape (B, T, D).

    Only forwards inside the block are recorded, not their recomputation in the backward.
    """
    h_by_loop: list[Tensor] = []

    def record(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        h_by_loop.append(args[0].detach())

    def record_last(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        h_by_loop[model.n_loops :] = [args[0].detach()]

    # h is the input of layer 0 in each loop, and the input of the final norm after the last. With
    # loop_loss, the norm then runs for all loops.
    handles = [
        model.layers[0].register_forward_pre_hook(record),
        model.norm.register_forward_pre_hook(record_last),
    ]
    try:
        yield h_by_loop
    finally:
        for handle in handles:
            handle.remove()


def loop_stats(model: LoopedTransformer, probe: Probe, h_by_loop: list[Tensor]) -> dict[str, float]:
    n_loops = len(model.layout)
    assert len(h_by_loop) == n_loops + 1, f"{n_loops} loops, {len(h_by_loop)} residual streams"
    local: dict[str, Tensor | float] = {f"h/{i}": _mean_square(h) for i, h in enumerate(h_by_loop)}
    for loop, (u, h) in enumerate(zip(h_by_loop[:-1], h_by_loop[1:], strict=True)):
        local[f"update/{loop}"] = _mean_square(h.float() - u.float())
    masses = first_token_masses(model, probe)
    local |= {f"mass/{loop}/{i}": x for loop, m in enumerate(masses) for i, x in m.items()}
    means = dist_mean_dict(local)

    stats = {}
    for loop in range(n_loops):
        stats[f"loops/residual_rms/{loop}"] = means[f"h/{loop + 1}"] ** 0.5
        stats[f"loops/residual_growth/{loop}"] = (
            means[f"h/{loop + 1}"] / means[f"h/{loop}"]
        ) ** 0.5
        stats[f"loops/update_norm/{loop}"] = (means[f"update/{loop}"] / means[f"h/{loop}"]) ** 0.5
        if model.rho is not None:
            stats[f"loops/rho/{loop}"] = model.rho[loop].detach().abs().mean().item()
        mass = {layer: means[f"mass/{loop}/{layer}"] for layer in masses[loop]}
        if mass:
            stats[f"loops/first_token_mass/{loop}"] = sum(mass.values()) / len(mass)
        for layer, value in mass.items():
            stats[f"depth/first_token_mass/{loop * len(model.layers) + layer}"] = value
    return stats


def first_token_masses(model: LoopedTransformer, probe: Probe) -> list[dict[int, float]]:
    """Return the attention mass on the first token, by loop, then by layer that logs one."""
    masses: list[dict[int, float]] = [{} for _ in model.layout]
    for layer, column in enumerate(zip(*model.layout, strict=True)):
        names = [MIXERS[spec.mixer].module_name for spec in column]
        for name in dict.fromkeys(names):
            loops = [loop for loop, n in enumerate(names) if n == name]
            calls = probe.calls(f"layers.{layer}.{name}", "first_token_mass")
            if calls:
                for loop, stats in zip(loops, calls, strict=True):
                    masses[loop][layer] = stats["mean"]
    return masses


def layer_stats(model: LoopedTransformer) -> dict[str, float]:
    norms = torch.stack([clip_grad_norm_(layer, None) for layer in model.layers])
    return {f"layers/grad_norm/{i}": norm for i, norm in enumerate(norms.tolist())}


def _mean_square(x: Tensor) -> Tensor:
    return x.float().square().mean()
