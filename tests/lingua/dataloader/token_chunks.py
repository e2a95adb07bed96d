"""Chunks of documents and their token files, for the tests of pretokenized data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from lingua.dataloader.args import DataArgs
from lingua.dataloader.pretokenized import TokenFiles, TokenRecipe, write_token_files
from lingua.tokenizer import TokenizerArgs, build_tokenizer
from tests.setup_scripts import load_script

script = load_script("tokenize_data")


def write_chunk(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    lines.insert(2, "   ")  # blank lines don't count
    path.write_text("\n".join(lines))  # no newline at the end


def data_args(tmp_path: Path) -> DataArgs:
    """Three chunks of one source, and one of another."""
    for i in range(3):
        texts = [f"{i}/{j} " + "aé" * (j % 9) for j in range(20)]
        write_chunk(tmp_path / "web" / f"web.chunk.{i:02d}.jsonl", ["", *texts])
    write_chunk(tmp_path / "code" / "code.chunk.00.jsonl", ["def f(): pass", "x" * 100, "y", "z"])
    return DataArgs(
        root_dir=str(tmp_path),
        sources={"web": 3.0, "code": 1.0},
        batch_size=2,
        seq_len=16,
        prefetch_size=3,
        load_async=False,
        seed=5,
        tokenizer=TokenizerArgs(name="bytes"),
    )


def code_files(args: DataArgs) -> TokenFiles:
    return TokenFiles(Path(args.root_dir or "") / "code" / "code.chunk.00.jsonl")


def tokenize(args: DataArgs, *options: str) -> None:
    script.main(
        [
            f"data.root_dir={args.root_dir}",
            "data.sources={web: 1, code: 1}",
            f"data.add_bos={args.add_bos}",
            f"data.tokenizer.name={args.tokenizer.name}",
            *options,
        ]
    )


def write(args: DataArgs, chunk: Path) -> None:
    write_token_files(chunk, build_tokenizer(args.tokenizer.name), TokenRecipe.of(args))


def replace_text(chunk: Path, old: str, new: str) -> None:
    assert len(old) == len(new) and old in chunk.read_text()
    chunk.write_text(chunk.read_text().replace(old, new))
    touch(chunk)


def touch(file: Path) -> None:
    """Move the mtime by a second, however coarse the file system's clock is."""
    now = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(now, now))


def set_row(index: Path, at: tuple[int, int], value: int) -> None:
    np.memmap(index, np.int64, mode="r+").reshape(-1, 2)[at] = value
