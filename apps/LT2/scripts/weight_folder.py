"""Write a folder of weights, config and tokenizer atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lingua.errors import UserError
from lingua.files.atomic import fsync_path, write_atomic
from lingua.tokenizer import (
    CONFIG_NAME,
    SPECIALS_NAME,
    TOKENIZERS,
    TokenizerArgs,
    find_tokenizer_file,
)

TOKENIZER_EXTRAS = (CONFIG_NAME, SPECIALS_NAME, "chat_template.jinja")


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to `out` at the end of the block.

    UserError if `out` exists and is not empty.
    """
    final = Path(out).resolve()
    if not out or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise UserError(f"out={out} exists and is not empty; name another folder, or remove it")
    aside = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out}: not writable: {error}") from None
    try:
        yield aside
        for file in (*aside.iterdir(), aside):
            fsync_path(file)
        os.rename(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_path(final.parent)


def copy_tokenizer(folder: Path, tokenizer: TokenizerArgs) -> None:
    """Copy the tokenizer file under its standard name, with the files next to it that are read."""
    file = find_tokenizer_file(tokenizer.name, tokenizer.path)
    if file is None:
        return
    name = TOKENIZERS[tokenizer.name][1]
    assert name is not None, "a tokenizer with a file has a name for it"
    shutil.copyfile(file, folder / name)
    for other in TOKENIZER_EXTRAS:
        if file.with_name(other).is_file():
            shutil.copyfile(file.with_name(other), folder / other)


def write_json(file: Path, content: Any) -> None:
    write_atomic(file, json.dumps(content, indent=2) + "\n")
