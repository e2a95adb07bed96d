"""Prepare your own texts for training: shuffle, hold out a part, split into chunks.

    python -m apps.LT2.scripts.prepare my_texts --train_tokenizer 4096

reads a file, or a folder with its subfolders: .txt, .md, .jsonl, .json (an array, or an object a
line), each also with .gz or .zst, .parquet, and .arrow (of `datasets`, save_to_disk). It makes
data/my_texts_shuffled and prints the command that trains on it. 5% of the documents, at most
10,000, are held out for the validation loss.

A text file is a document; longer ones are cut at blank lines after 64 kB. The result depends on the
seed, not on the memory. An earlier result is never overwritten: the same command leaves it alone,
another one is refused. After an error or Ctrl-C, the unfinished folder is removed.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lingua.config.cli import OneLineParser
from lingua.errors import run_cli
from lingua.prepare.corpus import describe, file_errors, memory_bytes, prepare_corpus
from lingua.prepare.shuffle import ShufflePlan
from lingua.prepare.sources import SUFFIXES
from lingua.prepare.splits import ALL
from lingua.prepare.tokenizer import (
    TOKENIZER_NAME,
    add_tokenizer,
    check_vocabulary,
    estimate_tokens,
)
from lingua.tokenizer import build_tokenizer

CONFIG = "apps/LT2/configs/600M/debug.yaml"
ROOT = Path(__file__).resolve().parents[3]


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.prepare", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("source", type=Path, help="file, or folder of files")
    add("--out", type=Path, help="output folder (default: data/<source>_shuffled)")
    add("--text_field", help="field or column of the text (default: text, else content)")
    add("--split", default="train", help=f"split of a folder to read: train, test, ..., {ALL}")
    add("--train_tokenizer", type=int, metavar="N", help="also train a tokenizer of N tokens")
    add(
        "--validation_documents",
        type=int,
        help="documents held out for the validation loss; 0: none (default: 5%%, at most 10,000)",
    )
    add("--nchunks", type=int, help="training files (default: 8, or 1 below 1,000 documents)")
    add("--seed", type=int, default=42, help="seed of the shuffle")
    add("--memory", type=float, default=2.0, help="GB of memory to shuffle in")
    given = parser.parse_args(argv)
    parser.require_positive(given, "nchunks")
    parser.require_at_least(0, given, "validation_documents")
    if given.train_tokenizer is not None:
        check_vocabulary("--train_tokenizer", given.train_tokenizer)
    return given


def name_of(source: Path) -> str:
    """Return the name of a file without its format, or of a folder, without blanks."""
    name = source.resolve().name
    if source.is_file():
        name = name.removesuffix(
            max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")
        )
    return re.sub(r"[^\w-]+", "_", name) or "corpus"


def main(argv: Sequence[str]) -> None:
    given = parse_options(argv)
    name = name_of(given.source)
    out = given.out or Path("data", f"{name}_shuffled")
    plan = ShufflePlan(
        name=name,
        seed=given.seed,
        n_chunks=given.nchunks,
        n_validation=given.validation_documents,
        memory=memory_bytes(given.memory, "--memory"),
        text_field=given.text_field,
    )
    with file_errors():
        manifest = prepare_corpus(given.source, out, plan, split=given.split, keep_unfinished=False)
        if given.train_tokenizer:
            add_tokenizer(out, given.train_tokenizer)
    print(f"{out}: {describe(manifest)}{how_to_train(out, name, given.train_tokenizer)}")


def how_to_train(out: Path, name: str, has_tokenizer: bool) -> str:
    """Return the number of tokens and the training command."""
    config = CONFIG if Path(CONFIG).is_file() else ROOT / CONFIG
    options = [f"config={config}", f"data.root_dir={out}", "data.sources={}"]
    if has_tokenizer:
        file = out / TOKENIZER_NAME
        options += ["data.tokenizer.name=hf", f"data.tokenizer.path={file}"]
        tokenizer = build_tokenizer("hf", str(file))
    else:
        options.append("data.tokenizer.name=bytes")
        tokenizer = build_tokenizer("bytes")
    options.append(f"dump_dir=runs/{name}")
    return (
        f"; about {estimate_tokens(out, tokenizer):,} tokens of training text; train with\n"
        f"python -m apps.LT2.train {shlex.join(options)}"
    )


if __name__ == "__main__":
    run_cli(main)
