"""Loss on held-out text, in nats per token and in bits per byte.

Bits per byte do not depend on the tokenizer: the nats of all tokens of a text, over its length in
UTF-8 bytes. A token that nothing predicts, a text's first one where texts do not see each other and
have no bos, counts in neither. Every rank builds the same rows of tokens and scores its share of
them, so the result is the same on any number of ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apps.LT2.batch import Batch, to_device
from apps.LT2.transformer import LoopedTransformer
from lingua.data import find_val_files, iter_val_documents
from lingua.dataloader.args import DataArgs
from lingua.dataloader.packing import NO_TARGET, view_row
from lingua.distributed import agree_any, dist_sum
from lingua.errors import UserError
from lingua.logger import log_on_rank_0
from lingua.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


@dataclass
class ValidationArgs:
    max_steps: int | None = None  # documents that are read, in the files' order; null = all
    use_val_from_train_src: bool = True  # read the *.val.jsonl files of data.sources
    root_dir: str = ""  # folder of the other validation sources
    sources: list[str] = field(default_factory=list)  # sub-folders of root_dir to read as well

    def __post_init__(self):
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(
                f"max_steps={self.max_steps} must be at least 1, or null for all documents"
            )


def check_validation_sources(args: ValidationArgs, section: str) -> None:
    """Refuse folders that are not there, also where max_steps would never reach them. `section` is
    what the program calls `args`."""
    if bool(args.root_dir) != bool(args.sources):
        raise UserError(
            f"{section}.root_dir={args.root_dir!r} and {section}.sources={args.sources}: sources "
            "are sub-folders of root_dir; set both, or neither"
        )
    for source in args.sources:
        if not find_val_files(args.root_dir, [source]):
            raise UserError(
                f"{section}.sources: no *.val.jsonl in {Path(args.root_dir, source)} "
                f"(seen from {Path.cwd()})"
            )


@dataclass(frozen=True)
class ValidationRows:
    """Documents laid one after the other and cut into rows of seq_len + 1 tokens.

    `tokens` (n_rows, seq_len + 1) int64, `starts` of the same shape: 1 at the first token of a
    document. `n_bytes` of text are scored; what is not text is NO_TARGET.
    """

    tokens: np.ndarray
    starts: np.ndarray
    n_bytes: int

    def views(self, begin: int, end: int, doc_mask: bool) -> np.ndarray:
        """Rows as the loader of the training data yields them; behind the last, rows of padding."""
        import numpy as np

        shape = (end - begin, self.tokens.shape[1])
        tokens, starts = np.full(shape, NO_TARGET), np.zeros(shape, dtype=np.int64)
        there = self.tokens[begin:end]
        tokens[: len(there)], starts[: len(there)] = there, self.starts[begin:end]
        rows = zip(tokens, starts, strict=True)
        views = np.stack([view_row(row, 2, first if doc_mask else None) for row, first in rows])
        views[..., 0].clip(min=0, out=views[..., 0])  # any token will do
        return views


def build_rows(documents: Iterable[tuple[list[int], int]], seq_len: int) -> ValidationRows | None:
    """Rows from (tokens, bytes of text) pairs; None if there are no two tokens.

    Neighbouring rows share one token, so that each token but the very first is a target once.
    """
    import numpy as np

    pieces, starts, n_bytes = [], [], 0
    for tokens, size in documents:
        first = np.zeros(len(tokens), dtype=np.int64)
        first[:1] = 1
        pieces.append(np.asarray(tokens, dtype=np.int64))
        starts.append(first)
        n_bytes += size
    n_tokens = sum(map(len, pieces))
    if n_tokens < 2:
        return None
    n_rows = math.ceil((n_tokens - 1) / seq_len)

    def rows(flat: np.ndarray, fill: int) -> np.ndarray:
        padded = np.full(n_rows * seq_len + 1, fill, dtype=np.int64)
        padded[:n_tokens] = flat
        return np.stack([padded[i * seq_len : (i + 1) * seq_len + 1] for i in range(n_rows)])

    tokens = rows(np.concatenate(pieces), NO_TARGET)
    return ValidationRows(tokens, rows(np.concatenate(starts), 0), n_bytes)


def places_of_text(args: ValidationArgs, data: DataArgs) -> list[tuple[str, list[str]]]:
    """(root, sources) of the folders that hold validation text."""
    root, sources = data.root_dir, list(data.sources)
    places = []
    if args.use_val_from_train_src and root and find_val_files(root, sources):
        places.append((root, sources))
    if args.sources:
        places.append((args.root_dir, args.sources))
    return places


class Validator:
    """Scores a model on validation text; reads and tokenises it once, at the first call."""

    def __init__(self, args: ValidationArgs, data: DataArgs, tokenizer: Tokenizer):
        self.args, self.data, self.tokenizer = args, data, tokenizer
        self._rows: ValidationRows | None = None
        self._read = False

    def rows(self) -> ValidationRows | None:
        if not self._read:
            self._rows = build_rows(self._documents(), self.data.seq_len)
            self._read = True
            if self._rows is None:
                logger.info("no *.val.jsonl beside the training data: no validation loss")
        return self._rows

    def _documents(self) -> Iterator[tuple[list[int], int]]:
        """(tokens, bytes of text that they are scored for) of each text."""
        n_read, is_predicted = 0, False
        for root, sources in places_of_text(self.args, self.data):
            for text in iter_val_documents(root, sources):
                if n_read == self.args.max_steps:
                    return
                n_read += 1
                tokens = self.tokenizer.encode(text, self.data.add_bos, self.data.add_eos)
                if self.data.doc_mask and len(tokens) < 2:
                    continue
                n_bytes = len(text.encode("utf-8"))
                if tokens and not (is_predicted or self.data.add_bos):
                    first, *_ = self.tokenizer.get_token_offsets(text, tokens)[0]
                    n_bytes -= len(first.encode("utf-8"))
                yield tokens, n_bytes
                is_predicted = not self.data.doc_mask and (is_predicted or len(tokens) > 0)

    @torch.no_grad()
    def __call__(
        self,
        model: LoopedTransformer,
        *,
        device: torch.device,
        rank: int,
        world_size: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """{"loss/val", "loss/val_bpb"}, the same on every rank; empty without validation text, and
        where `should_stop`, which every rank is asked after each batch, is true on one of them.

        A collective: every rank runs the same number of batches.
        """
        rows = self.rows()
        if rows is None:
            return {}
        log_on_rank_0("validation on %d rows of %d tokens", len(rows.tokens), self.data.seq_len)
        was_training = model.training
        model.eval()
        model.begin_step(None)
        nats_and_targets = torch.zeros(2, dtype=torch.float64, device=device)
        stopped = False
        for x, target, cu_seqlens in self._batches(rows, device, rank, world_size):
            n_targets = (target != -100).sum()
            loss = model(x, target, cu_seqlens)
            nats_and_targets += torch.stack((loss.double() * n_targets, n_targets.double()))
            if stopped := agree_any(should_stop()):
                break
        model.train(was_training)
        if stopped:
            return {}
        # Ranks of tensor parallelism score the same rows.
        n_copies = round(dist_sum(1.0).item()) // world_size
        nats, n_targets = (dist_sum(nats_and_targets) / n_copies).tolist()
        return {
            "loss/val": nats / n_targets,
            "loss/val_bpb": nats / math.log(2) / max(rows.n_bytes, 1),
        }

    def _batches(
        self, rows: ValidationRows, device: torch.device, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """This rank's rows; what is padding, or fills a batch up, is no target."""
        size = self.data.batch_size
        for first in range(0, len(rows.tokens), size * world_size):
            begin = first + rank * size
            views = rows.views(begin, begin + size, self.data.doc_mask)
            yield to_device(views, self.data.doc_mask, device)
