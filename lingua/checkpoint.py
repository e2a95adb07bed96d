"""Checkpoints of a run: which to keep, how to save them, which one to load.

    checkpoints/0000001000/
        .metadata, __R_N.distcp      tensors of rank R, a file per thread, see checkpointing/dcp.py
        train_state_00000.json       per data-parallel rank: step, data, scheduler, rng
        params.json                  the whole config
        manifest.json                size and checksum of every file above
        consolidated/                weights in one file, made on demand

A save writes to `0000001000.tmp`, syncs it to disk and renames it. So a folder whose name is
exactly ten digits is complete, even if the run was killed. Rank 0 alone decides what to load and
what to delete, and an error on one rank is raised on all.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lingua.args import dataclass_to_dict, diff_configs, load_config_file
from lingua.checkpointing.dcp import CONFIG_NAME as CONFIG_NAME
from lingua.checkpointing.dcp import load_from_checkpoint as load_from_checkpoint
from lingua.checkpointing.dcp import require_files
from lingua.checkpointing.folder import FOLDER_NAME as FOLDER_NAME
from lingua.checkpointing.folder import (
    MANIFEST_NAME,
    check_files,
    check_tensor_files,
    clear_leftovers,
    find_problem,
    is_checkpoint,
    is_own,
    is_published,
    remove_checkpoint,
)
from lingua.checkpointing.folder import TRAIN_STATE_NAME as TRAIN_STATE_NAME
from lingua.checkpointing.metadata import METADATA_NAME, read_metadata
from lingua.checkpointing.save import Save
from lingua.checkpointing.weights import CONSOLIDATE_FOLDER as CONSOLIDATE_FOLDER
from lingua.checkpointing.weights import CONSOLIDATE_NAME as CONSOLIDATE_NAME
from lingua.checkpointing.weights import SAFETENSORS_NAME, find_weights
from lingua.checkpointing.weights import consolidate_checkpoints as consolidate_checkpoints
from lingua.dataloader.resume import reject_lingua_state
from lingua.distributed import (
    RanksFailed,
    get_dp_rank_and_degree,
    get_global_rank,
    get_world_size,
    run_on_rank_0,
    run_together,
)
from lingua.errors import MachineFault, UserError
from lingua.logger import log_on_rank_0
from lingua.parallel.signals import defer_interrupt
from lingua.redact import redact_all
from lingua.rng import get_rng_state, set_rng_state

logger = logging.getLogger(__name__)

RNG_KEY = "rng"
INIT_OPTION = "checkpoint.init_ckpt_path"
RUN_CONFIG = "config.yaml"  # in the folder of a run
PENDING_SAVE = "the checkpoint that is being written"
TRAIN_STATE_GLOB = "train_state_[0-9][0-9][0-9][0-9][0-9].json"
REQUIRED_FILES = (METADATA_NAME, CONFIG_NAME, TRAIN_STATE_NAME.format(0))


@dataclass
class SaveEvery:
    every: int = 1000  # steps between two checkpoints; 0 or less turns them off
    keep: int = 0  # how many of the newest to keep; 0 or less keeps all

    def fires(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


@dataclass
class CheckpointArgs:
    # checkpoints to resume from. Unless keep is 0, other checkpoints (saved on preemption or at the
    # end) are deleted once there is a newer one
    dump: SaveEvery = field(default_factory=SaveEvery)
    eval: SaveEvery = field(default_factory=SaveEvery)  # checkpoints to evaluate
    # write in the background while training continues; needs CPU memory for a copy of what a rank
    # saves. Training still waits before an evaluation and at the end
    async_save: bool = False
    path: str | None = None  # folder of all checkpoints; null is <dump_dir>/checkpoints
    # run, step folder or weight file that a new run starts from; not read once the run has a
    # checkpoint
    init_ckpt_path: str | None = None
    # also take optimizer, step and data position from init_ckpt_path
    continue_training_from_init: bool = False

    def __post_init__(self):
        if self.path == "":
            raise UserError("checkpoint.path is empty: name a folder, or null for one in dump_dir")
        if self.continue_training_from_init and self.init_ckpt_path is None:
            raise UserError(
                "checkpoint.continue_training_from_init=true needs checkpoint.init_ckpt_path"
            )


def check_init(args: CheckpointArgs, n_steps: int) -> None:
    """Raise UserError if a run without checkpoints could not start from init_ckpt_path.

    `n_steps` is the number of steps at the end of the run.
    """
    if args.init_ckpt_path is None:
        return
    folder = find_checkpoint(args.init_ckpt_path, INIT_OPTION)
    if folder.is_dir():
        read_metadata(folder)
    if args.continue_training_from_init:
        option = f"checkpoint.continue_training_from_init=true: {INIT_OPTION}="
        require_files(folder, *REQUIRED_FILES, option=option)
        file = folder / TRAIN_STATE_NAME.format(0)
        try:
            state = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{option}{folder}: {file.name} is not JSON: {error}") from None
        reject_lingua_state(state.get("data_loader_state", {}), str(file))
        if state["step"] >= n_steps:
            raise UserError(
                f"{option}{folder} has done {state['step']} steps and steps={n_steps}: nothing is "
                "left to do; increase steps"
            )


def find_checkpoint(path: str | os.PathLike, option: str = "ckpt") -> Path:
    """Return the step folder or weight file that `path` names; for a run, its newest checkpoint.

    UserError, naming `option`, if there is none.
    """
    given = Path(path)
    found = find_weights(given) if str(path) else None  # Path("") is the working directory
    try:
        for folder in _checkpoint_folders(given) if str(path) and found is None else ():
            manager = CheckpointManager(CheckpointArgs(path=str(folder)))
            found = found or manager.foreign_save or manager.get_last_step_path()
    except UserError as error:  # all are damaged
        raise UserError(f"{option}={path}: {str(error).partition(';')[0]}") from None
    if found is None:
        raise UserError(
            f"{option}={path}: {_what_is_at(given) if str(path) else 'the path is empty'}; name a "
            "run folder, a step folder such as <run>/checkpoints/0000001000, or a weight file "
            f"({CONSOLIDATE_NAME} or {SAFETENSORS_NAME})"
        )
    return found


def _checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders in which a run may have its checkpoints."""
    folders = [run / "checkpoints", run]
    with suppress(OSError, UserError):
        path = (load_config_file(run / RUN_CONFIG).get("checkpoint") or {}).get("path")
        folders += [Path(path)] if path else []
    return folders


def _what_is_at(path: Path) -> str:
    """Describe in a few words a path without checkpoint, for an error."""
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        guess = f"; did you mean {path.parent / close[0]}?" if close else ""
        return f"no such file or folder (relative to {Path.cwd()}{guess})"
    if (path / RUN_CONFIG).is_file():
        return "this run has no complete checkpoint"
    names = sorted(p.name for p in path.iterdir())
    runs = [name for name in names if (path / name / RUN_CONFIG).is_file()]
    shown = ", ".join((runs or names)[:5]) + (", ..." if len(runs or names) > 5 else "")
    if runs:
        return f"this is a folder of runs ({shown})"
    if is_checkpoint(path):
        return f"this checkpoint is incomplete: {METADATA_NAME} is missing"
    return f"no complete checkpoint in this folder ({shown or 'empty'})"


class TrainState(Protocol):
    """What a run saves beside tensors; the state dict is JSON and has "step"."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def load_state_dicts(self, states: list[dict[str, Any]], rank: int, n_ranks: int) -> None:
        """Resume as data-parallel rank `rank` of `n_ranks` from another number of ranks."""
        ...


@dataclass
class Loaded:
    path: Path
    step: int
    differences: list[str]  # "optim.lr: 0.0003 -> 0.0001", saved -> now


class CheckpointManager:
    def __init__(self, args: CheckpointArgs):
        assert args.path, "checkpoint.path must be resolved before the manager is built"
        self.args = args
        self.path = Path(args.path)
        self._save: Save | None = None  # not yet published

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

    @property
    def foreign_save(self) -> Path | None:
        """The newest complete checkpoint of another program. None if any is ours."""
        saves = self.existing_saves
        if any((folder / MANIFEST_NAME).exists() for folder in saves):
            return None
        names = (METADATA_NAME, CONFIG_NAME)
        complete = [p for p in saves if all((p / name).is_file() for name in names)]
        return complete[-1] if complete else None

    def check_foreign(self) -> None:
        """Raise UserError if another program wrote the checkpoints of this folder."""
        if (folder := self.foreign_save) is not None:
            raise UserError(
                f"{self.path}: another program, such as Meta Lingua, wrote these checkpoints (they "
                "have no manifest.json), so a run cannot resume from them; start a new run in "
                f"another dump_dir from their weights, with checkpoint.init_ckpt_path={folder}"
            )

    def get_last_step_path(self, *, quiet: bool = False) -> Path | None:
        """Return the newest undamaged checkpoint. With `quiet`, do not log damaged ones."""
        return self._newest_readable({}, quiet=quiet)

    # ---- save

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        train_state: TrainState,
        config: Any,
        device_mesh: DeviceMesh | None = None,
    ) -> bool:
        """Save a checkpoint of `train_state`'s step, then delete checkpoints that no rule keeps.

        A collective. On return the checkpoint is complete on disk. With checkpoint.async_save it is
        complete after the next `finish`, or the `poll` that finds it written. Ctrl-C waits for it;
        a second Ctrl-C does not.
        """
        with defer_interrupt(PENDING_SAVE):
            self.finish()
            state = train_state.state_dict()
            assert RNG_KEY not in state, f"{RNG_KEY!r} is the manager's own key in the train state"
            state[RNG_KEY] = get_rng_state()
            dp_rank, _ = get_dp_rank_and_degree(device_mesh)
            name = None if _is_tp_copy(device_mesh) else TRAIN_STATE_NAME.format(dp_rank)
            in_background, given = self.args.async_save, _as_dict(config)
            self._save = Save(
                self.path, model, optimizer, state, name, given, in_background=in_background
            )
            if not in_background:
                self.finish()
        return True

    def poll(self) -> None:
        """Publish the pending save if all ranks have written it. A collective."""
        if self._save is not None and self._save.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait for the pending save, if any, and publish it. A collective."""
        with defer_interrupt(PENDING_SAVE):
            self._publish()

    def _publish(self) -> None:
        save, self._save = self._save, None
        if save is not None:
            log_on_rank_0("saved checkpoint %s", save.publish())
            run_on_rank_0(lambda: self.clean_up(save.step))

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """Publish the pending save, unless an error stopped only some of the ranks.

        A single process also publishes it after Ctrl-C; another Ctrl-C stops that.
        """
        if exc_type is None:
            self.finish()
        elif self._save is not None and _stops_all_ranks(exc_type):
            log_on_rank_0("finishing checkpoint %s; Ctrl-C drops it", self._save.final)
            try:
                self._publish()
            except Exception as error:  # the run's own error is the one to raise
                logger.error(f"the pending checkpoint is lost: {error}")
        elif self._save is not None:
            self._save.wait()
            self._save = None

    def clean_up(self, step: int | None = None) -> None:
        """Delete checkpoints that no rule keeps, and leftovers of killed saves.

        Keep the newest checkpoint, and every folder with files that we did not write. Do not count
        or delete checkpoints after `step`, which was just saved: the run resumed from before them,
        so they are not readable.
        """
        saves = [p for p in self.existing_saves if step is None or int(p.name) <= step]
        kinds = {p: self._kinds_of(p) for p in saves if is_published(p)}
        saves = list(kinds)
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
        """Return which of dump and eval fired at this step, by the config saved with it."""
        try:
            saved = json.loads((folder / CONFIG_NAME).read_text())["checkpoint"]
            every = {kind: int(saved[kind]["every"]) for kind in ("dump", "eval")}
        except (OSError, ValueError, LookupError, TypeError):  # another program's config
            every = {"dump": self.args.dump.every, "eval": self.args.eval.every}
        return {kind for kind, n in every.items() if SaveEvery(n).fires(int(folder.name))}

    # ---- load

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
        """Load `path` or the newest readable checkpoint; return None without any checkpoint.

        Restores tensors, train state and random generators in place. Reports where `config` differs
        from the saved one. Without a checkpoint, `continue_training_from_init` resumes from
        `checkpoint.init_ckpt_path`. A collective.
        """
        run_on_rank_0(lambda: clear_leftovers(self.path))
        if path is None and self.args.continue_training_from_init:
            is_new = run_on_rank_0(lambda: not self.existing_saves)
            if is_new:
                source = self.args.init_ckpt_path or ""
                path = run_on_rank_0(lambda: find_checkpoint(source, INIT_OPTION))
        unreadable: dict[Path, str] = {}
        while True:
            folder = (
                Path(path) if path else run_on_rank_0(lambda: self._newest_readable(unreadable))
            )
            if folder is None:
                return None
            saved_config = run_on_rank_0(partial(_check_and_read_config, folder))
            defaults, differences = {}, []
            if config is not None:
                with suppress(TypeError):  # an option without a default
                    defaults = _as_dict(type(config)())
                differences = diff_configs(saved_config, _as_dict(config), defaults)
            try:
                _load_tensors(folder, model, optimizer)
                break
            except UserError as error:
                raise UserError(f"{error}{_name_cause(differences)}") from None
            except RanksFailed as error:
                if path and isinstance(error, MachineFault):
                    raise
                if path:
                    raise UserError(f"cannot load checkpoint {folder}: {error}") from None
                message = "cannot load checkpoint %s, trying the previous one: %s"
                log_on_rank_0(message, folder, error, level=logging.WARNING)
                unreadable[folder] = str(error)

        self._load_train_state(folder, train_state, *get_dp_rank_and_degree(device_mesh))
        log_on_rank_0("loaded checkpoint %s", folder)
        return Loaded(folder, train_state.state_dict()["step"], differences)

    def _load_train_state(
        self, folder: Path, train_state: TrainState, rank: int, n_ranks: int
    ) -> None:
        n_saved = run_on_rank_0(lambda: len(list(folder.glob(TRAIN_STATE_GLOB))))
        own = rank % n_saved
        # A rank needs the states of all ranks only if the number of ranks has changed.
        ranks = [own] if n_saved == n_ranks else list(range(n_saved))
        files = [folder / TRAIN_STATE_NAME.format(i) for i in ranks]
        states = run_together(lambda: [json.loads(file.read_text()) for file in files])
        generators = [state.pop(RNG_KEY, None) for state in states]
        if n_saved == n_ranks:
            run_together(lambda: train_state.load_state_dict(states[0]))
        else:
            log_on_rank_0(
                f"{folder} was saved by {n_saved} data-parallel ranks and this run has {n_ranks}: "
                "the remaining data is redistributed, a step has "
                f"{n_ranks / n_saved:g} times as many tokens (see grad_acc_steps), and each rank "
                "takes the random state of a saved rank",
                level=logging.WARNING,
            )
            run_together(lambda: train_state.load_state_dicts(states, rank, n_ranks))
        generator = generators[ranks.index(own)]
        if generator is not None:
            set_rng_state(generator)

    def _newest_readable(self, unreadable: dict[Path, str], *, quiet: bool = False) -> Path | None:
        """Return the newest undamaged checkpoint that is not in `unreadable`; add damaged ones."""
        self.check_foreign()
        for folder in reversed(self.existing_saves):
            if folder in unreadable:
                continue
            problem = find_problem(folder)
            if problem is None:
                return folder
            if not quiet:
                logger.warning(
                    f"checkpoint {folder} is damaged, trying the previous one: {problem}"
                )
            unreadable[folder] = problem
        if unreadable:
            newest = max(unreadable)
            raise UserError(
                f"none of the {len(unreadable)} checkpoints in {self.path} is readable "
                f"({newest.name}: {unreadable[newest]}); move them away to start from step 0"
            )
        return None


def _stops_all_ranks(error: type[BaseException]) -> bool:
    return get_world_size() == 1 or issubclass(error, (FloatingPointError, RanksFailed))


def _as_dict(config: Any) -> dict[str, Any]:
    """Return the config as it is saved and compared: a plain dict without secrets."""
    plain = dict(config) if isinstance(config, Mapping) else dataclass_to_dict(config)
    return redact_all(plain)


def _check_and_read_config(folder: Path) -> dict[str, Any]:
    require_files(folder, *REQUIRED_FILES)
    check_files(folder, str(folder))
    read_metadata(folder)
    return json.loads((folder / CONFIG_NAME).read_text())


def _load_tensors(folder: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
    rank, world_size = get_global_rank(), get_world_size()
    run_together(lambda: check_tensor_files(folder, rank, world_size))
    run_together(lambda: load_from_checkpoint(folder, model, optimizer))


def _name_cause(differences: list[str]) -> str:
    """Return the end of an error: the changed options that can make a checkpoint not fit."""
    causes = "; ".join(d for d in differences if d.startswith(("model.", "data.tokenizer.")))
    ways = "Change it back, or use another dump_dir, perhaps with checkpoint.init_ckpt_path"
    return f". Changed since: {causes}. {ways}" if causes else ""


def _is_tp_copy(device_mesh: DeviceMesh | None) -> bool:
    """Return whether another rank of the tensor-parallel group writes this rank's train state."""
    if device_mesh is None or "tp" not in (device_mesh.mesh_dim_names or ()):
        return False
    return device_mesh.get_local_rank("tp") != 0
