"""One checkpoint on its way to disk: begun together, written by each rank, published together."""

from __future__ import annotations

import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from lingua.checkpointing.dcp import MODEL_KEY, OPTIM_KEY, optimizer_state
from lingua.checkpointing.folder import (
    FOLDER_NAME,
    UNFINISHED,
    make_empty,
    publish,
    write_train_state,
)
from lingua.distributed import (
    agree_any,
    gather_objects,
    get_is_master,
    run_on_rank_0,
    run_together,
)
from lingua.errors import MachineFault


class Save:
    """Constructing it is a collective, and so are `is_written` and `publish`.

    With `in_background` a thread writes while training goes on; the thread takes part in no
    collective, so that it never comes in between those of the training.
    """

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
        """`state_name` is None on a rank whose train state another one writes."""
        self.step = state["step"]
        self.final = parent / FOLDER_NAME.format(self.step)
        self._unfinished = self.final.with_name(self.final.name + UNFINISHED)
        self._config, self._state_name = config, state_name
        self._state_text = json.dumps(state)  # now: training goes on with these objects
        self._files: dict[str, Any] = {}
        self._error: Exception | None = None
        run_on_rank_0(lambda: make_empty(self._unfinished))
        self._tensors = TensorSave(self._unfinished, model, optimizer, copy=in_background)
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        if in_background:
            self._thread.start()
        else:
            self._write()

    def _write(self) -> None:
        try:
            self._tensors.write()
            self._files = write_train_state(self._unfinished, self._state_name, self._state_text)
        except Exception as error:  # raised where all ranks are together
            self._error = error

    def is_written(self) -> bool:
        """Whether all ranks have written; the same answer on all of them."""
        return not agree_any(self._thread.is_alive())

    def wait(self) -> None:
        """Until this rank has written. Not a collective."""
        if self._thread.ident is not None:
            self._thread.join()

    def publish(self) -> Path:
        """Wait, complete the folder and give it its name; what failed on any rank is raised."""
        self.wait()
        try:
            run_together(self._raise_error)
            self._tensors.finish()
            by_rank = gather_objects(self._files)
            files = {name: entry for of_rank in by_rank for name, entry in of_rank.items()}
            run_on_rank_0(
                lambda: publish(self._unfinished, self.final, self.step, files, self._config)
            )
        except Exception:
            # On a disk that is full, half a checkpoint would be in the way of everything.
            if get_is_master():
                shutil.rmtree(self._unfinished, ignore_errors=True)
            raise
        return self.final

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class TensorSave:
    def __init__(
        self, folder: Path, model: nn.Module, optimizer: Optimizer | None, *, copy: bool
    ) -> None:
        """Plan a save into `folder`, which is there and empty. A collective."""
        # First the weights: state_dict makes FSDP register those parameters that the optimizer
        # knows, even if a forward without backward (validation) left gathered ones in their place.
        state: dict[str, Any] = {MODEL_KEY: model.state_dict()}
        if optimizer is not None:
            state[OPTIM_KEY] = {"state": optimizer_state(model, optimizer)}
        self.folder = folder
        self._writer = FileSystemWriter(folder)
        self._planner = _StagedPlanner()
        self._metadata: Metadata | None = None  # on rank 0
        self._results: list[WriteResult] = []
        own_plan = run_together(lambda: self._plan_own(state))
        all_plans = _gather_on_rank_0(own_plan)
        all_plans = _only_on_rank_0(lambda: self._plan_all(all_plans))
        self._plan = self._planner.finish_plan(_scatter_from_rank_0(all_plans))
        if copy:
            run_together(lambda: self._planner.stage(self._plan))

    def _plan_own(self, state: dict[str, Any]) -> SavePlan:
        is_first = _rank() == 0
        self._planner.set_up_planner(state, self._writer.storage_meta(), is_first)
        self._writer.set_up_storage_writer(is_first, rank=_rank(), use_collectives=True)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def _plan_all(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    def write(self) -> None:
        """Write this rank's file and fsync it."""
        try:
            self._results = self._writer.write_data(self._plan, self._planner).value()
        except (RuntimeError, OSError) as error:
            # torch's own writer hides the reason, most often a full disk, behind a wrong file
            # position
            free = shutil.disk_usage(self.folder).free / 2**30
            raise MachineFault(
                f"could not write {self.folder} ({free:.2f} GiB free there); checkpoints before "
                f"it are whole: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
        self._planner.forget()

    def finish(self) -> None:
        """Write what is where, after all ranks have written. A collective."""
        results = _gather_on_rank_0(self._results)

        def write_metadata() -> None:
            assert self._metadata is not None, "rank 0 planned the save"
            self._writer.finish(self._metadata, results)

        run_on_rank_0(write_metadata)


class _StagedPlanner(DefaultSavePlanner):
    """Hands out copies of what this rank writes, once they were made."""

    _staged: dict[MetadataIndex, Tensor | io.BytesIO] | None = None

    def stage(self, plan: SavePlan) -> None:
        self._staged = {item.index: _copy(self.resolve_data(item)) for item in plan.items}
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if self._staged is None:
            return super().resolve_data(write_item)
        return self._staged[write_item.index]

    def forget(self) -> None:
        self._staged, self.state_dict = {}, {}


def _copy(data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    return data.detach().to("cpu", copy=True) if isinstance(data, torch.Tensor) else data


# ---- between rank 0, which plans for all, and the others


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _only_on_rank_0(work: Any) -> Any:
    """As run_on_rank_0, but the result, which may be large, stays there; None elsewhere."""
    results: list[Any] = [None]

    def keep() -> None:
        results[0] = work()

    run_on_rank_0(keep)
    return results[0]


def _gather_on_rank_0(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def _scatter_from_rank_0(values: list[Any] | None) -> Any:
    if not dist.is_initialized():
        assert values is not None, "a single process is rank 0"
        return values[0]
    box: list[Any] = [None]
    dist.scatter_object_list(box, values, src=0)
    return box[0]
