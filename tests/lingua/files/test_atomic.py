"""Files that cannot be written are named, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from lingua.checkpointing.weights import write_weights
from lingua.errors import MachineFault, UserError, is_machine_fault
from lingua.files.atomic import write_atomic
from lingua.files.lock import lock_folders
from tests.lingua.stool_utils import limited_files

WEIGHTS = {"w": torch.zeros(10_000)}


@pytest.mark.parametrize("name", ["text.json", "weights.pth", "weights.safetensors"])
def test_a_file_beyond_the_limit_is_named_and_keeps_its_old_content(tmp_path, name):
    file = tmp_path / name
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    file.write_text("old")

    def write():
        if name == "text.json":
            write_atomic(file, "x" * 10_000)
        else:
            write_weights(file, WEIGHTS, {})

    with limited_files(5000), pytest.raises((OSError, MachineFault), match=name) as caught:
        write()
    assert is_machine_fault(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name] and file.read_text() == "old"
    write()
    assert file.stat().st_size >= 10_000 and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_lock_that_cannot_be_written_names_the_option(tmp_path):
    message = f"dump_dir={tmp_path}.*File too large"
    lock = lock_folders({"dump_dir": tmp_path})
    with limited_files(0), pytest.raises(UserError, match=message), lock:
        pass
