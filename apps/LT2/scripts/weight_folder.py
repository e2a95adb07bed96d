"""A folder that holds weights, config and tokenizer, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lingua.errors import UserError
from lingua.files.atomic import fsync_path
from lingua.tokenizer import TOKENIZERS, TokenizerArgs, find_tokenizer_file

BESIDE_TOKENIZER = ("tokenizer_config.json", "chat_template.jinja")


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` when the block is left without an error.

    Until then nothing is at `out`, so what is there is whole. A UserError where something is.
    """
    final = Path(out).resolve()
    if not out or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise UserError(f"out={out} must be a new or an empty folder: name another, or remove it")
    aside = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error}") from None
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
    """The tokenizer's file, under the name that is looked for, and what else is read beside it."""
    file = find_tokenizer_file(tokenizer.name, tokenizer.path)
    if file is None:
        return
    name = TOKENIZERS[tokenizer.name][1]
    assert name is not None, "a tokenizer with a file has a name for it"
    shutil.copyfile(file, folder / name)
    for other in BESIDE_TOKENIZER:
        if file.with_name(other).is_file():
            shutil.copyfile(file.with_name(other), folder / other)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
