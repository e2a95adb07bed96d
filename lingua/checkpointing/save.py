"""One checkpoint that is being saved: planned together, written by each rank, published together.

A thread can write while training continues. Like torch's own `dcp.save`, a save has three parts:
plan on all ranks, write the tensors, write the metadata. Only the middle part runs in the thread,
because a collective there could interleave with the collectives of training.
"""

from __future__ import annotations

import io
import json
import logging
import resource
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper  # what dcp.save plans with
from torch.optim import Optimizer

from lingua.checkpointing.dcp import tensors_to_save
from lingua.checkpointing.folder import (
    FOLDER_NAME,
    UNFINISHED,
    TensorFiles,
    make_empty,
    publish,
    write_train_state,
)
from lingua.checkpointing.metadata import map_in_threads, max_threads
from lingua.distributed import (
    agree_any,
    gather_objects,
    get_is_master,
    run_on_rank_0,
    run_together,
)
from lingua.errors import MachineFault, find_disk_fault, first_line
from lingua.optim import state_fields

logger = logging.getLogger(__name__)

MIN_SHARE = 2**26  # bytes per thread, and per file


class Save:
    """Construction, `is_written` and `publish` are collectives."""

    def __init__(
        self,
        parent: Path,
        model: nn.Module,
        optimizer: Optimizer | None,
        state: dict[str, Any],
        state_name: str | None,
        config: dict[str, Any],
        *,
        in_background: bool,
    ):
        """Start the thread that writes. With `in_background`, first copy the tensors to the CPU.

        `state_name` is the file of `state`, or None if another rank writes it.
        """
        self.step = state["step"]
        self.final = parent / FOLDER_NAME.format(self.step)
        self._unfinished = self.final.with_name(self.final.name + UNFINISHED)
        self._config, self._state_name = config, state_name
        self._state_text = json.dumps(state)  # now, because training changes these objects
        self._files: dict[str, Any] = {}
        self._tensor_files = TensorFiles()
        self._results: list[WriteResult] = []
        self._error: Exception | None = None
        run_on_rank_0(lambda: make_empty(self._unfinished))
        self._writer, self._planner = FileSystemWriter(self._unfinished), _StagingPlanner()
        self._metadata: Metadata | None = None  # on rank 0
        self._plan = self._make_plan(tensors_to_save(model, optimizer))
        if in_background:
            run_together(lambda: self._planner.stage(self._plan))
        self._is_done = threading.Event()
        threading.Thread(target=self._write, name="checkpoint", daemon=True).start()

    def _make_plan(self, tensors: dict[str, Any]) -> SavePlan:
        """Decide which rank writes which tensor. Rank 0 plans for all."""
        rank = dist.get_rank() if dist.is_initialized() else 0

        def plan_own() -> SavePlan:
            self._planner.set_up_planner(tensors, self._writer.storage_meta(), rank == 0)
            self._writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        def plan_all(plans: list[SavePlan]) -> list[SavePlan]:
            plans, self._metadata = self._planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        own = run_together(plan_own)
        ranks = _DistWrapper(None, use_dist=dist.is_initialized(), coordinator_rank=0)
        try:
            plan = ranks.reduce_scatter("plan", lambda: own, plan_all)
        except CheckpointException as error:  # a BaseException
            raise RuntimeError(f"the plan of checkpoint {self.step} failed: {error}") from error
        return self._planner.finish_plan(plan)

    def _write(self) -> None:
        try:
            self._results = self._write_tensors()
            if self._state_name is not None:
                name, text = self._state_name, self._state_text
                self._files |= write_train_state(self._unfinished, name, text)
        except Exception as error:  # `publish` raises it on all ranks
            self._error = error
        finally:
            self._is_done.set()

    def _write_tensors(self) -> list[WriteResult]:
        tensors = [item.tensor_data for item in self._plan.items if item.tensor_data is not None]
        n_bytes = sum(t.chunk.sizes.numel() * t.properties.dtype.itemsize for t in tensors)
        n_files = count_files(n_bytes)
        writer = FileSystemWriter(self._unfinished, thread_count=n_files, per_thread_copy_ahead=0)
        writer.fs = self._tensor_files
        try:
            results = writer.write_data(self._plan, self._planner).value()
            for error in self._tensor_files.errors:
                raise error
        except (RuntimeError, OSError) as error:
            free = shutil.disk_usage(self._unfinished).free / 2**30
            reason = find_disk_fault(error) or f"{type(error).__name__}: {first_line(error)}"
            raise MachineFault(
                f"could not write {self._unfinished} ({free:.2f} GiB free); earlier checkpoints "
                f"are intact: {reason}"
            ) from error
        self._planner.forget()
        self._files |= self._tensor_files.entries
        return results

    def is_written(self) -> bool:
        """Return whether all ranks have written; the answer is the same on all ranks."""
        return not agree_any(not self._is_done.is_set())

    def wait(self) -> None:
        """Wait until this rank has written, or Ctrl-C cancels the save. Not a collective."""
        try:
            # An interrupted Thread.join would count the thread as ended. Python may notice a signal
            # that arrives just before a wait only after it, so each wait is short.
            while not self._is_done.wait(0.5):
                pass
        except KeyboardInterrupt:
            self._tensor_files.is_cancelled = True
            self._is_done.wait(1)  # a thread that still writes at exit would abort the process
            raise

    def publish(self) -> Path:
        """Wait for all ranks, complete the folder and rename it. Errors are raised on all ranks."""
        self.wait()
        try:
            run_together(self._raise_error)
            written = gather_objects((self._results, self._files))
            run_on_rank_0(lambda: self._complete(written))
        except Exception:
            if get_is_master():  # an unfinished folder would fill the disk
                shutil.rmtree(self._unfinished, ignore_errors=True)
            raise
        return self.final

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _complete(self, written: list[tuple[list[WriteResult], dict[str, Any]]]) -> None:
        """Write the metadata from what all ranks have written, and publish."""
        assert self._metadata is not None, "rank 0 has planned the save"
        self._writer.finish(self._metadata, [results for results, _ in written])
        files = {name: entry for _, of_rank in written for name, entry in of_rank.items()}
        publish(self._unfinished, self.final, self.step, files, self._config)


def count_files(n_bytes: int) -> int:
    """Return how many threads, each with its own file, write `n_bytes` of one rank."""
    return min(max_threads(), 1 + n_bytes // MIN_SHARE)


def warn_of_small_disk(folder: Path, optimizer: Optimizer, n_ranks: int) -> None:
    """Log a warning if a checkpoint does not fit on the disk, or into the limit of file sizes.

    The size counts the weights and the optimizer's tensors.
    """
    n_bytes = sum(
        param.numel() * param.element_size() * (1 + len(fields - {"step"}))
        for param, fields in state_fields(optimizer).items()
    )
    free, (limit, _) = shutil.disk_usage(folder).free, resource.getrlimit(resource.RLIMIT_FSIZE)
    too_small = []
    if free < n_bytes:
        too_small.append(f"the disk has {_format_size(free)} free")
    per_file = n_bytes / n_ranks / count_files(n_bytes // n_ranks)
    if limit != resource.RLIM_INFINITY and limit < per_file:
        too_small.append(f"files are limited to {_format_size(limit)} (ulimit -f)")
    if too_small:
        logger.warning(
            "checkpoint.path=%s: a checkpoint needs about %s, but %s",
            *(folder, _format_size(n_bytes), " and ".join(too_small)),
        )


def _format_size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3g} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.3g} MiB"


class _StagingPlanner(DefaultSavePlanner):
    """A planner that can copy what this rank writes to the CPU, so that training may continue."""

    _staged: dict[MetadataIndex, Tensor | io.BytesIO] | None = None

    def stage(self, plan: SavePlan) -> None:
        items = [super(_StagingPlanner, self).resolve_data(item) for item in plan.items]
        copies = map_in_threads(partial(_to_host, copy=True), items)
        self._staged = {item.index: copy for item, copy in zip(plan.items, copies, strict=True)}
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if self._staged is None:
            return _to_host(super().resolve_data(write_item))
        return self._staged[write_item.index]

    def forget(self) -> None:
        self._staged, self.state_dict = {}, {}


def _to_host(data: Tensor | io.BytesIO, *, copy: bool = False) -> Tensor | io.BytesIO:
    """Return the data in the memory of the host; with `copy`, never the same tensor.

    A copy from a GPU goes to pinned memory, which torch keeps for the next save.
    """
    if isinstance(data, io.BytesIO):
        return data
    if not data.is_cuda:
        return data.detach().clone() if copy else data
    host = data.detach().to("cpu", non_blocking=True)
    torch.cuda.current_stream(data.device).synchronize()
    return host
