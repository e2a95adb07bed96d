"""Checkpoints of a run: when they are kept, how they are written, which one is loaded.

    checkpoints/0000001000/
        .metadata, __R_0.distcp      model and optimizer tensors of rank R (see tensor_store.py)
        train_state_00000.json       one for every data-parallel rank: step, data, scheduler, rng
        params.json                  the whole config
        manifest.json                every file above, its bytes and its checksum
        consolidated/                weights in one file, made on demand

A checkpoint is written into `0000001000.tmp`, made durable and then renamed: a folder whose name is
exactly ten digits is complete, whenever the run was killed. Rank 0 alone decides what is loaded and
what is deleted, and a failure on one rank is raised on all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lingua.args import dataclass_to_dict, diff_configs
from lingua.checkpointing.dcp import CONFIG_NAME as CONFIG_NAME
from lingua.checkpointing.dcp import CONSOLIDATE_FOLDER as CONSOLIDATE_FOLDER
from lingua.checkpointing.dcp import CONSOLIDATE_NAME as CONSOLIDATE_NAME
from lingua.checkpointing.dcp import METADATA_NAME
from lingua.checkpointing.dcp import consolidate_checkpoints as consolidate_checkpoints
from lingua.checkpointing.dcp import load_from_checkpoint as load_from_checkpoint
from lingua.checkpointing.folder import FOLDER_NAME as FOLDER_NAME
from lingua.checkpointing.folder import (
    MANIFEST_NAME,
    check_tensor_files,
    clear_leftovers,
    find_problem,
    is_checkpoint,
    is_own,
    is_published,
    remove_checkpoint,
)
from lingua.checkpointing.folder import TRAIN_STATE_NAME as TRAIN_STATE_NAME
from lingua.checkpointing.save import Save
from lingua.checkpointing.weights import check_init_path
from lingua.distributed import (
    RanksFailed,
    get_dp_rank_and_degree,
    get_global_rank,
    get_world_size,
    run_on_rank_0,
    run_together,
)
from lingua.errors import UserError
from lingua.logger import log_on_rank_0
from lingua.parallel.signals import finished_before_interrupt
from lingua.redact import redact_all
from lingua.rng import get_rng_state, set_rng_state

logger = logging.getLogger(__name__)

RNG_KEY = "rng"
SAVE_UNDER_WAY = "the checkpoint that is being written"
TRAIN_STATE_GLOB = "train_state_[0-9][0-9][0-9][0-9][0-9].json"


@dataclass
class SaveEvery:
    every: int = 1000  # steps between two; 0 never
    keep: int = 0  # how many of the newest are kept; 0 or less keeps all

    def fires(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


@dataclass
class CheckpointArgs:
    # checkpoints to resume from. Others than these (on preemption, at the end) are deleted once a
    # newer one is there, unless keep is 0
    dump: SaveEvery = field(default_factory=SaveEvery)
    eval: SaveEvery = field(default_factory=SaveEvery)  # checkpoints that are evaluated
    # write in the background while training goes on; takes CPU memory for a copy of what a rank
    # saves. What is evaluated, and the last save of a run, is waited for all the same
    async_save: bool = False
    path: str | None = None  # folder of all checkpoints; null is <dump_dir>/checkpoints
    # step folder, or file of weights alone, that a new run starts from; a run that has checkpoints
    # of its own goes on from those, and this may be gone
    init_ckpt_path: str | None = None
    # take optimizer, step and data position from init_ckpt_path, too
    continue_training_from_init: bool = False

    def __post_init__(self):
        if self.path == "":
            raise UserError("checkpoint.path is empty: name a folder, or null for one in dump_dir")
        for name, rule in (("dump", self.dump), ("eval", self.eval)):
            if rule.every < 0:
                raise UserError(f"checkpoint.{name}.every={rule.every}: must be 0 (never) or more")
        if self.continue_training_from_init and self.init_ckpt_path is None:
            raise UserError(
                "checkpoint.continue_training_from_init=true needs checkpoint.init_ckpt_path"
            )


def check_init(args: CheckpointArgs) -> None:
    """Refuse, before any work, what a run without a checkpoint of its own could not start from."""
    check_init_path(args.init_ckpt_path)
    if not args.continue_training_from_init:
        return
    for name in (METADATA_NAME, CONFIG_NAME, TRAIN_STATE_NAME.format(0)):
        if not Path(args.init_ckpt_path or "", name).is_file():
            raise UserError(
                f"checkpoint.init_ckpt_path={args.init_ckpt_path} has no {name}: "
                "checkpoint.continue_training_from_init=true goes on from a step folder that a run "
                "has saved; name one, or leave it false to take the weights alone"
            )


class TrainState(Protocol):
    """What a run needs beside tensors; the state dict is JSON and holds "step"."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def load_state_dicts(self, states: list[dict[str, Any]], rank: int, n_ranks: int) -> None:
        """Go on, as data-parallel rank `rank` of `n_ranks`, from what other many ranks saved."""
        ...


@dataclass
class Loaded:
    path: Path
    step: int
    config: dict[str, Any]  # what the run that saved it was configured with
    differences: list[str]  # "optim.lr: 0.0003 -> 0.0001", saved -> now


class CheckpointManager:
    def __init__(self, args: CheckpointArgs):
        assert args.path, "checkpoint.path must be resolved before the manager is built"
        self.args = args
        self.path = Path(args.path)
        self._save: Save | None = None  # under way

    @classmethod
    def instantiate_and_make_dir(cls, args: CheckpointArgs) -> CheckpointManager:
        manager = cls(args)
        run_on_rank_0(lambda: manager.path.mkdir(parents=True, exist_ok=True))
        return manager

    @property
    def existing_saves(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(p for p in self.path.iterdir() if is_checkpoint(p))

    def get_last_step_path(self, *, quiet: bool = False) -> Path | None:
        """The newest checkpoint whose files are all as they were written; `quiet` where `load`,
        which comes later, tells of damaged ones."""
        return self._newest_readable({}, quiet=quiet)

    # ---- saving

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        train_state: TrainState,
        config: Any,
        device_mesh: DeviceMesh | None = None,
    ) -> bool:
        """Write a checkpoint of `train_state`'s step, then delete those that need not be kept.

        A collective. When it returns, the checkpoint is complete on disk; with
        checkpoint.async_save after the next `finish`, or a `poll` that finds it written. A Ctrl-C
        waits for that, too; a second one does not.
        """
        with finished_before_interrupt(SAVE_UNDER_WAY):
            self._begin_save(model, optimizer, train_state, config, device_mesh)
        return True

    def _begin_save(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        train_state: TrainState,
        config: Any,
        device_mesh: DeviceMesh | None,
    ) -> None:
        self.finish()
        state = train_state.state_dict()
        assert RNG_KEY not in state, f"{RNG_KEY!r} is the manager's own key in the train state"
        state[RNG_KEY] = get_rng_state()
        dp_rank, _ = get_dp_rank_and_degree(device_mesh)
        name = None if _is_tp_copy(device_mesh) else TRAIN_STATE_NAME.format(dp_rank)
        in_background = self.args.async_save
        self._save = Save(
            *(self.path, model, optimizer, state, name, _as_dict(config)),
            in_background=in_background,
        )
        if not in_background:
            self.finish()

    def poll(self) -> None:
        """Publish the save under way if all ranks have written it. A collective."""
        if self._save is not None and self._save.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if any, and publish it. A collective."""
        with finished_before_interrupt(SAVE_UNDER_WAY):
            self._publish()

    def _publish(self) -> None:
        save, self._save = self._save, None
        if save is None:
            return
        log_on_rank_0("saved checkpoint %s", save.publish())
        run_on_rank_0(lambda: self.clean_up(save.step))

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """Publish the save under way, also after an error that all ranks share, and after any (a
        Ctrl-C, too) in a run of one; else drop it. Another Ctrl-C ends the wait."""
        if exc_type is None:
            self.finish()
        elif self._save is not None and _is_of_all_ranks(exc_type):
            log_on_rank_0(
                "finishing checkpoint %s before leaving; Ctrl-C drops it", self._save.final
            )
            try:
                self._publish()
            except Exception as error:  # that of the run is the one to raise
                logger.error(f"the checkpoint that was being written is lost: {error}")
        elif self._save is not None:
            self._save.wait()
            self._save = None

    def clean_up(self, step: int | None = None) -> None:
        """Delete checkpoints that no rule keeps, and leftovers of saves that were cut off.

        The newest checkpoint always stays, and so does every folder that this class did not write
        or that somebody put a file into. Those after `step`, which the run has just saved, are
        neither counted nor deleted: it came from before them, so they could not be read.
        """
        saves = [
            p
            for p in self.existing_saves
            if is_published(p) and (step is None or int(p.name) <= step)
        ]
        kinds = {p: self._kinds_of(p) for p in saves}
        kept = set(saves[-1:])
        for kind, rule in (("dump", self.args.dump), ("eval", self.args.eval)):
            matching = [p for p in saves if kind in kinds[p]]
            kept.update(matching if rule.keep <= 0 else matching[-rule.keep :])
        if self.args.dump.keep <= 0:
            kept.update(p for p in saves if not kinds[p])
        for folder in saves:
            if folder not in kept and is_own(folder):
                logger.info(f"deleting checkpoint {folder}")
                remove_checkpoint(folder)
        clear_leftovers(self.path)

    def _kinds_of(self, folder: Path) -> set[str]:
        """What a checkpoint was saved for, of dump and eval, by the rules that it was saved under:
        the run may go on under others."""
        try:
            saved = json.loads((folder / CONFIG_NAME).read_text())["checkpoint"]
            every = {kind: int(saved[kind]["every"]) for kind in ("dump", "eval")}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            # Another kind of program saved it.
            every = {"dump": self.args.dump.every, "eval": self.args.eval.every}
        return {kind for kind, n in every.items() if SaveEvery(n).fires(int(folder.name))}

    # ---- loading

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        train_state: TrainState,
        device_mesh: DeviceMesh | None = None,
        *,
        config: Any = None,
        path: str | os.PathLike | None = None,
    ) -> Loaded | None:
        """Continue from `path`, or from the newest checkpoint that can be read; None if none is.

        Restores tensors, train state and random generators, and says where `config` differs from
        the saved one. A run without a checkpoint starts from `checkpoint.init_ckpt_path` where
        `continue_training_from_init` says so. A collective.
        """
        run_on_rank_0(lambda: clear_leftovers(self.path))
        unreadable: dict[Path, str] = {}
        while True:
            folder = (
                Path(path) if path else run_on_rank_0(lambda: self._newest_readable(unreadable))
            )
            if folder is None and self.args.continue_training_from_init:
                path = folder = Path(self.args.init_ckpt_path or "")
            if folder is None:
                return None
            run_on_rank_0(lambda f=folder: _check_is_checkpoint(f))
            try:
                share = (get_global_rank(), get_world_size())
                run_together(lambda f=folder, s=share: check_tensor_files(f, *s))
                run_together(lambda f=folder: load_from_checkpoint(f, model, optimizer))
                break
            except UserError as error:
                raise UserError(f"{error}{_what_changed(folder, config)}") from None
            except RanksFailed as error:
                if path:
                    raise
                told = "cannot load checkpoint %s, trying the one before: %s"
                log_on_rank_0(told, folder, error, level=logging.WARNING)
                unreadable[folder] = str(error)

        saved_config = run_on_rank_0(lambda: json.loads((folder / CONFIG_NAME).read_text()))
        self._load_train_state(folder, train_state, *get_dp_rank_and_degree(device_mesh))
        differences = [] if config is None else diff_configs(saved_config, _as_dict(config))
        log_on_rank_0("loaded checkpoint %s", folder)
        return Loaded(folder, train_state.state_dict()["step"], saved_config, differences)

    def _load_train_state(
        self, folder: Path, train_state: TrainState, rank: int, n_ranks: int
    ) -> None:
        n_saved = run_on_rank_0(lambda: len(list(folder.glob(TRAIN_STATE_GLOB))))
        mine = rank % n_saved
        # Only where their number has changed does a rank need what the others saved.
        ranks = [mine] if n_saved == n_ranks else list(range(n_saved))
        states = run_together(lambda: [_read_train_state(folder, i) for i in ranks])
        generators = [state.pop(RNG_KEY, None) for state in states]
        if n_saved == n_ranks:
            run_together(lambda: train_state.load_state_dict(states[0]))
        else:
            log_on_rank_0(
                f"{folder} was written by {n_saved} data-parallel ranks and this run has "
                f"{n_ranks}: the batches that those would have read next are dealt to these, a "
                f"step is {n_ranks / n_saved:g} times as many tokens (see grad_acc_steps), and "
                "random generators go on from a rank's state or a copy of it",
                level=logging.WARNING,
            )
            run_together(lambda: train_state.load_state_dicts(states, rank, n_ranks))
        generator = generators[ranks.index(mine)]
        if generator is not None:
            set_rng_state(generator)

    def _newest_readable(self, unreadable: dict[Path, str], *, quiet: bool = False) -> Path | None:
        for folder in reversed(self.existing_saves):
            if folder in unreadable:
                continue
            problem = find_problem(folder)
            if problem is None:
                return folder
            if not quiet:
                logger.warning(f"checkpoint {folder} is damaged, trying the one before: {problem}")
            unreadable[folder] = problem
        if unreadable:
            newest = max(unreadable)
            raise UserError(
                f"none of the {len(unreadable)} checkpoints in {self.path} can be read "
                f"({newest.name}: {unreadable[newest]}); move them away to start anew"
            )
        return None


def _is_of_all_ranks(error: type[BaseException]) -> bool:
    return get_world_size() == 1 or issubclass(error, (FloatingPointError, RanksFailed))


def _as_dict(config: Any) -> dict[str, Any]:
    """As it is saved and compared: plain, and without secrets."""
    plain = dict(config) if isinstance(config, Mapping) else dataclass_to_dict(config)
    return redact_all(plain)


def _what_changed(folder: Path, config: Any) -> str:
    """The options that make the model another one than the checkpoint's, for an error's end."""
    try:
        saved = json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return ""
    changed = [] if config is None else diff_configs(saved, _as_dict(config))
    changed = [line for line in changed if line.startswith(("model.", "data.tokenizer."))]
    if not changed:
        return ""
    return (
        f". Changed since it was saved: {'; '.join(changed)}. Set it back, or name another dump_dir"
    )


def _is_tp_copy(device_mesh: DeviceMesh | None) -> bool:
    """Whether another rank of the tensor-parallel group writes this rank's train state."""
    names = device_mesh.mesh_dim_names or () if device_mesh is not None else ()
    return device_mesh is not None and "tp" in names and device_mesh.get_local_rank("tp") != 0


def _check_is_checkpoint(folder: Path) -> None:
    for name in (METADATA_NAME, CONFIG_NAME, TRAIN_STATE_NAME.format(0)):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no checkpoint folder: it has no {name} file")
    # One that torch itself has made has no manifest, and nothing to hold its files to.
    problem = find_problem(folder) if (folder / MANIFEST_NAME).exists() else None
    if problem is not None:
        raise UserError(f"the checkpoint {folder} is damaged: {problem}; name another one")


def _read_train_state(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / TRAIN_STATE_NAME.format(rank)).read_text())
