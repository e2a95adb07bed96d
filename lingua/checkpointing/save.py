"""One checkpoint on its way to disk: begun together, written by each rank, published together."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

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
from lingua.tensor_save import TensorSave


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
