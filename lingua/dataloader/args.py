"""Options of `data:`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lingua.dataloader.synthetic.args import TaskArgs, build_task
from lingua.errors import UserError
from lingua.tokenizer import TokenizerArgs


@dataclass
class DataArgs:
    root_dir: str | None = None  # folder that contains the sources
    # sub-folder of root_dir -> weight. Weights are shares of *documents* and need not sum to 1:
    # with equal weights, the source with longer documents gives more tokens. Sources on the
    # command line replace the sources of the config. Empty: the chunks in root_dir itself, "."
    sources: dict[str, float] = field(default_factory=dict)
    batch_size: int = 2  # rows per micro-batch and data-parallel rank
    seq_len: int = 2048  # tokens per row; with a task, the length of its examples
    n_views: int = 2  # the input, and n_views - 1 targets, each shifted by one more token
    seed: int | None = None  # order of sources and rows; null = the top-level seed
    add_bos: bool = True  # start each document with the tokenizer's bos token
    add_eos: bool = True  # end each document with the tokenizer's eos token
    # true: documents in the same row do not see each other; false: a row is plain text
    doc_mask: bool = False
    load_async: bool = True  # read and tokenize in a worker process; same stream
    pretokenized: bool = False  # read the tokens of setup/tokenize_data.py; same stream
    prefetch_size: int = 64  # batches that are shuffled together; filled before the first step
    tokenizer: TokenizerArgs = field(default_factory=TokenizerArgs)
    task: TaskArgs | None = None  # synthetic examples in place of root_dir and sources

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "n_views", "prefetch_size"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"data.{name} must be 1 or more, got {value}")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"data.seed must be 0 or more, got {self.seed}")
        for source, weight in self.sources.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"data.sources.{source} must be 0 or more, got {weight}")
        if self.sources and not any(self.sources.values()):
            raise UserError("data.sources: all weights are 0; give at least one above 0")
        if self.task is not None:
            self._fit_to_task(self.task)

    def _fit_to_task(self, args: TaskArgs) -> None:
        """Set the options that follow from the task. UserError if they are set to other values."""
        task = build_task(args)
        for name in ("sources", "root_dir"):
            if value := getattr(self, name):
                raise UserError(
                    f"data.{name}={value} and data.task.name={task.name}: set only one of them "
                    "(data.sources={} data.root_dir=null for the task, data.task=null for text)"
                )
        for name in ("doc_mask", "pretokenized"):
            if getattr(self, name):
                raise UserError(
                    f"data.{name}=true and data.task.name={task.name}: an example fills its row "
                    "and is made during training; remove the option"
                )
        if self.seq_len not in (DataArgs.seq_len, task.seq_len):
            raise UserError(
                f"data.seq_len={self.seq_len} contradicts data.task.name={task.name}, whose "
                f"examples have {task.seq_len} tokens with these options; remove data.seq_len"
            )
        self.seq_len = task.seq_len
