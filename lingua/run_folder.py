"""The folders that a run writes to: made and tried at the start, and held by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lingua.files.lock import hold_folders, make_writable
from lingua.parallel.ranks import get_is_master

__all__ = ["make_writable", "own_folders"]


@contextmanager
def own_folders(folders: Mapping[str, str | os.PathLike]) -> Iterator[None]:
    """Make the folders (option -> path), and hold them on rank 0: two runs would mix their files.

    No collective: it comes before the process group, which a refused rank 0 never joins.
    """
    for option, folder in folders.items():
        make_writable(option, Path(folder))
    if not get_is_master():
        yield
        return
    with hold_folders(folders):
        yield
