"""Record statistics of every linear layer in one forward and backward, one JSON line per probe.

    probe = Probe(model, dump_dir / "probe" / "probe.0.jsonl")
    probe.metadata = {"it": step, "global_step": step, "loop": "lt2"}
    with probe:
        model(x, y).backward()

A line is {"data": {key: stats}, "meta": metadata, "version": 2, "quantiles": levels}. A linear at
module path P has the keys `P::in`, `P::w`, `P::out` and, for gradients, `P::in.g`, `P::w.g`,
`P::out.g`. `log_stats(x, "resid")` inside module P adds `P::resid` and `P::resid.g`. A module that
runs several times, as in a looped model, has one key per call: `P[0]::in`, `P[1]::in`. Gradients
come from this rank's loss, before averaging over ranks.

Compiled models run eagerly inside a probe. Recomputation by activation checkpointing is not
recorded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lingua.files.jsonl_log import RecordFile
from lingua.parallel.tensor_parallel import local_tensor

VERSION = 2
QUANTILES = [round(0.05 * i, 2) for i in range(1, 20)]
MOMENTS = ("mean", "std", "skew", "kurtosis", "abs.mean", "max", "min")
CHUNK = 1 << 24  # elements converted to fp32 at a time, since logits are large
QUANTILE_SAMPLE = 1 << 18  # evenly spaced elements, for the quantiles

_active: list[Probe] = []  # the probe that is open, if any


def is_probing() -> bool:
    """Whether a probe is open. Code that fuses linear layers must then run them separately."""
    return bool(_active)


def log_stats(x: Tensor, name: str) -> Tensor:
    """Record `x` and its gradient under the running module. Use the returned tensor, equal to x."""
    return _active[0].record(x, name) if _active else x


class Probe:
    """Context manager for one forward and backward of `module`. `results` holds the last data."""

    def __init__(self, module: nn.Module, write_file: str | os.PathLike | None = None):
        self.module = module
        self.file = None if write_file is None else RecordFile(write_file)
        if self.file is not None:
            self.file.path.parent.mkdir(parents=True, exist_ok=True)
        self.metadata: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self._handles: list[Any] = []
        self._stack: list[str] = []  # paths of the running modules
        self._calls: Counter[tuple[str, str]] = Counter()
        self._records: dict[tuple[str, int | None, str], _Stats] = {}
        self._stance: Any = None

    def __enter__(self) -> Probe:
        assert not _active, "only one probe at a time"
        self._calls.clear()
        self._records.clear()
        self._stack.clear()
        for path, module in self.module.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._enter_module(path), with_kwargs=True),
                module.register_forward_hook(self._leave_module(path), always_call=True),
            ]
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        _active.append(self)
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        _active.clear()
        self._stance.__exit__(exc_type, exc, traceback)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if exc_type is not None:
            return
        self.results = {self._key(*at): stats.as_dict() for at, stats in self._records.items()}
        self._records.clear()
        if self.file is not None:
            levels = {"version": VERSION, "quantiles": QUANTILES}
            self.file.append({"data": self.results, "meta": self.metadata, **levels})

    def record(self, x: Tensor, name: str) -> Tensor:
        """Record one call of log_stats."""
        if not self._stack:
            return x
        path = self._stack[-1]
        return self._record_value(x, path, self._next_call(path, name), name)

    def calls(self, path: str, name: str) -> list[dict[str, Any]]:
        """Return the last statistics of a name in the module at `path`, one per call."""
        return [self.results[self._key(path, i, name)] for i in range(self._calls[path, name])]

    # Modules. Outside the root's forward the stack is empty and nothing is recorded. This excludes
    # recomputation in the backward.

    def _enter_module(self, path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self._stack and module is not self.module:
                return None
            self._stack.append(path)
            if not isinstance(module, nn.Linear) or not args:
                return None
            call = self._next_call(path, "in")
            if call == 0:
                self._record_weight(module.weight, path)
            return (self._record_value(args[0], path, call, "in"), *args[1:]), kwargs

        return hook

    def _leave_module(self, path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if not self._stack or self._stack[-1] != path:
                return None
            self._stack.pop()
            if not isinstance(module, nn.Linear) or not isinstance(output, Tensor):
                return None
            return self._record_value(output, path, self._next_call(path, "out"), "out")

        return hook

    def _next_call(self, path: str, name: str) -> int:
        call = self._calls[path, name]
        self._calls[path, name] += 1
        return call

    # Values.

    def _record_value(self, x: Tensor, path: str, call: int, name: str) -> Tensor:
        """Record x, and return a view of x with a hook that records the gradient."""
        self._records[path, call, name] = _Stats(x)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        view = x.view_as(x)  # x may have other uses, which have other gradients
        view.register_hook(self._gradient_hook(path, call, name))
        return view

    def _record_weight(self, weight: Tensor, path: str) -> None:
        self._records[path, None, "w"] = _Stats(weight)
        if weight.requires_grad and torch.is_grad_enabled():
            # The hook of a leaf runs once, with the sum over all uses.
            self._handles.append(weight.register_hook(self._gradient_hook(path, None, "w")))

    def _gradient_hook(self, path: str, call: int | None, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self in _active:
                self._records[path, call, f"{name}.g"] = _Stats(gradient)

        return hook

    # Results.

    def _key(self, path: str, call: int | None, name: str) -> str:
        several = self._calls[path, name.removesuffix(".g")] > 1
        suffix = f"[{call}]" if call is not None and several else ""
        return f"{path}{suffix}::{name}"


AutoProbeD = Probe  # Lingua's name


class _Stats:
    """Statistics of a tensor, computed immediately, and kept on its device until `as_dict`."""

    def __init__(self, x: Tensor):
        x = local_tensor(x.detach())
        self.shape = list(x.shape)
        self.numbers = _numbers(x.reshape(-1)) if x.numel() else None

    def as_dict(self) -> dict[str, Any]:
        if self.numbers is None:
            return {"shape": self.shape}
        values = self.numbers.tolist()  # the only synchronization with the device
        moments = dict(zip(MOMENTS, values, strict=False))
        return {"shape": self.shape, **moments, "quantiles": values[len(MOMENTS) :]}


@torch.no_grad()
def _numbers(flat: Tensor) -> Tensor:
    """Return MOMENTS, then QUANTILES, in one fp64 tensor.

    Skew and kurtosis are central moments divided by powers of the std, so a normal distribution has
    kurtosis 3. Both are NaN for a constant.
    """
    chunks = flat.split(CHUNK)
    n = flat.numel()

    def mean_of(f: Callable[[Tensor], Tensor]) -> Tensor:
        sums = [f(chunk.float()).sum(dtype=torch.float64) for chunk in chunks]
        return torch.stack(sums).sum() / n

    mean = mean_of(lambda c: c)
    center = mean.float()
    variance = mean_of(lambda c: (c - center).square())
    std = variance.sqrt()
    skew = mean_of(lambda c: (c - center) ** 3) / std**3
    kurtosis = mean_of(lambda c: (c - center) ** 4) / variance**2
    moments = [mean, std, skew, kurtosis, mean_of(torch.abs), flat.max(), flat.min()]

    sample = flat[:: -(-n // QUANTILE_SAMPLE)].float()
    levels = torch.tensor(QUANTILES, device=flat.device)
    quantiles = torch.quantile(sample, levels)
    return torch.cat([torch.stack([m.double() for m in moments]), quantiles.double()])
