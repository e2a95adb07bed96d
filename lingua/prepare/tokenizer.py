"""Train a byte-level BPE tokenizer, and count the tokens of a corpus with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from lingua.dataloader.jsonl import TRAIN_PATTERN, document_text, own_lines, parse_line
from lingua.errors import UserError, import_optional
from lingua.files.atomic import write_atomic
from lingua.files.listing import list_files
from lingua.prepare.readers import to_line
from lingua.prepare.shuffle import MANIFEST_NAME
from lingua.tokenizer import Tokenizer

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>"]
MIN_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # the bytes
MAX_VOCABULARY = 100_000  # far above, the trainer runs out of memory
TRAINING_BYTES = 100 * 10**6  # of chunks: more text hardly changes the tokens
COUNTED_BYTES = 10**6  # of a chunk, from which the number of tokens is estimated
TOKENIZER_NAME = "tokenizer.json"


def check_vocabulary(option: str, size: int) -> None:
    if not MIN_VOCABULARY <= size <= MAX_VOCABULARY:
        raise UserError(
            f"{option} must be {MIN_VOCABULARY} (the bytes) to {MAX_VOCABULARY}, got {size}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Return the content of a tokenizer.json. The same texts give the same bytes."""
    import_optional("tokenizers", extra="", needed_by="training a tokenizer")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return (tokenizer.to_str(pretty=True) + "\n").encode()


def add_tokenizer(out: Path, vocab_size: int) -> None:
    """Train a tokenizer on the chunks of the complete folder `out`, and save it there.

    An equal request keeps the old file; UserError for a file that is not from one.
    """
    file, manifest_file = out / TOKENIZER_NAME, out / MANIFEST_NAME
    manifest, request = json.loads(manifest_file.read_bytes()), {"vocab_size": vocab_size}
    if not file.exists():
        content = train_tokenizer(chunk_texts(out, TRAINING_BYTES), vocab_size)
        write_atomic(manifest_file, json.dumps(manifest | {"tokenizer": request}, indent=2) + "\n")
        write_atomic(file, content)
    elif manifest.get("tokenizer") != request:
        raise UserError(
            f"--train_tokenizer {vocab_size}: {file} exists and was made in another way "
            f"({manifest.get('tokenizer', 'unknown')}); move it away"
        )


def chunk_texts(out: Path, n_bytes: int) -> Iterator[str]:
    """Yield the first documents of the chunks until they have `n_bytes`; one at least."""
    for chunk in list_files(out, TRAIN_PATTERN):
        for line, end in own_lines(chunk, 0, 1, 0):
            yield document_text(parse_line(line, chunk, end))
            if (n_bytes := n_bytes - len(line)) <= 0:
                return


def estimate_tokens(out: Path, tokenizer: Tokenizer) -> int:
    """Estimate the tokens of the chunks of `out` from their first megabyte."""
    size = sum(Path(chunk).stat().st_size for chunk in list_files(out, TRAIN_PATTERN))
    n_tokens = n_bytes = 0
    for text in chunk_texts(out, COUNTED_BYTES):
        n_tokens += len(tokenizer.encode(text, add_bos=True, add_eos=True))
        n_bytes += len(to_line({"text": text}, b""))
    return size * n_tokens // max(n_bytes, 1)
