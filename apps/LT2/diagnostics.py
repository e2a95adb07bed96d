"""What every loop does to the residual stream and what every layer learns: numbers of one pass.

    loops/residual_rms/T      RMS of h after loop T, over tokens and channels
    loops/update_norm/T       RMS of what loop T changed, h_after - h_before, over that of h_before
    loops/rho/T               mean of |rho[T]|; absent without use_residual
    loops/first_token_mass/T  mean probability that queries give to the first token of their
                              document, in the softmax layers of loop T; absent where it has none
    layers/grad_norm/L        norm of the gradient of layer L, which is the sum over the loops

Loops and layers count from 0. The mass is a mean over a layer's heads and sampled queries (see
first_token_mass), then over layers; the probe's own file has every (loop, layer) by itself, as
`layers.L.attention[call]::first_token_mass`. A mixer of another kind takes part by logging stats of
that name.

All ranks take part and get the same numbers: the residual stream and the mass are means over their
batches, the gradient is the one that they would step with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from apps.LT2.batch import Batch
from apps.LT2.mixers import MIXERS
from apps.LT2.parallel import set_gradient_sync
from apps.LT2.transformer import LoopedTransformer
from lingua.distributed import (
    clip_grad_norm_,
    dist_mean_dict,
    sync_replicated_grads,
)
from lingua.probe import Probe


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
