"""Print a run's validation loss in bits per byte, with byte frequencies and xz for comparison.

    python setup/reference_values.py runs/quickstart

All code the held-out text of the run's sources. `xz` after the training text counts the bytes that
the held-out text adds: like the model, it has then read both. At most 4 MB of each text are used.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lingua

from lingua.args import dataclass_from_dict, load_config_file
from lingua.data import TRAIN_PATTERN, fill_in_sources
from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import VAL_PATTERN, document_text
from lingua.errors import run_cli
from lingua.files.jsonl_log import read_jsonl_records
from lingua.files.listing import list_files

MAX_BYTES = 4_000_000


def read_text(data: DataArgs, pattern: str) -> bytes:
    """Return the start of the text of all sources."""
    text = bytearray()
    for source in data.sources:
        for file in list_files(Path(data.root_dir or "", source), pattern):
            with open(file, "rb") as lines:
                for line in lines:
                    if len(text) > MAX_BYTES:
                        return bytes(text)
                    text += document_text(json.loads(line)).encode() + b"\n\n"
    return bytes(text)


def byte_entropy(text: bytes) -> float:
    """Return the bits per byte of the best code that gives each byte its own code word."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def xz_size(text: bytes) -> int:
    """Return the size in bytes of the output of `xz -9`."""
    return len(lzma.compress(text, preset=9))


def main(argv: Sequence[str]) -> None:
    run = Path(argv[0])
    data = dataclass_from_dict(DataArgs, load_config_file(run / "config.yaml")["data"])
    data = fill_in_sources(data)
    held_out, train = read_text(data, VAL_PATTERN), read_text(data, TRAIN_PATTERN)
    measured = [r for r in read_jsonl_records(run / "metrics.jsonl") if "loss/val_bpb" in r]
    if not held_out or not measured:
        return
    n_bits = {
        "frequencies of the bytes": byte_entropy(held_out),
        "xz -9": 8 * xz_size(held_out) / len(held_out),
        f"this model, {measured[-1]['global_step']} steps": measured[-1]["loss/val_bpb"],
        "xz -9 after the training text": 8
        * (xz_size(train + held_out) - xz_size(train))
        / len(held_out),
    }
    print(f"bits per byte of the held-out text ({len(held_out):,} bytes), lower is better")
    for label, value in n_bits.items():
        print(f"  {label:31}{value:.2f}")


if __name__ == "__main__":
    run_cli(main)
