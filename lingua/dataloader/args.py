"""Options of `data:`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lingua.errors import UserError
from lingua.tokenizer import TokenizerArgs


@dataclass
class DataArgs:
    root_dir: str | None = None  # folder that holds the sources
    # sub-folder of root_dir -> weight; weights need not sum to 1. They are shares of *documents*:
    # of two sources of equal weight the one with longer documents gives more tokens. Sources on the
    # command line replace those of the config
    sources: dict[str, float] = field(default_factory=dict)
    batch_size: int = 2  # rows a data-parallel rank reads per micro-batch
    seq_len: int = 2048  # tokens a row
    n_views: int = 2  # the input, and n_views - 1 targets, each one token further ahead
    seed: int | None = None  # order of sources and rows; null = the top-level seed
    add_bos: bool = True  # begin each document with the tokenizer's bos token
    add_eos: bool = True  # end each document with the tokenizer's eos token
    # true: nothing passes from a document to the next one in its row; false: rows are plain text
    doc_mask: bool = False
    load_async: bool = True  # read and tokenize in a process of its own; the stream is the same
    # read the tokens that setup/tokenize_data.py wrote beside the chunks; the stream is the same
    pretokenized: bool = False
    prefetch_size: int = 64  # batches that are shuffled together; filled before the first step
    tokenizer: TokenizerArgs = field(default_factory=TokenizerArgs)

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "n_views", "prefetch_size"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"data.{name} must be 1 or more, got {value}")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"data.seed must be 0 or more, got {self.seed}")
        for source, weight in self.sources.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"data.sources.{source} must be 0 or more, got {weight}")
        if self.sources and not any(self.sources.values()):
            raise UserError("data.sources: all weights are 0, so there is nothing to read")
        if not math.isfinite(sum(self.sources.values())):
            raise UserError("data.sources: the sum of the weights is beyond a float; lower them")
