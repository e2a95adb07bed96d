"""Measure the loss on held-out text, in nats per token and in bits per byte.

A run on a synthetic task has held-out examples instead, with a loss and an accuracy of the answers.

Bits per byte are comparable across tokenizers: the sum of all tokens' nats, divided by ln 2 and by
the length of the text in UTF-8 bytes. A token that nothing predicts counts in neither sum: without
BOS, the first token of the first text, or with data.doc_mask of every text. All ranks build the
same rows and each scores its share, so the result doesn't depend on the number of ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apps.LT2.batch import Batch, to_device
from apps.LT2.exits import ExitRule, exit_states
from apps.LT2.transformer import LoopedTransformer
from lingua.data import ROOT_SOURCE
from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import find_val_files, iter_val_documents
from lingua.dataloader.packing import NO_TARGET, view_row
from lingua.dataloader.synthetic.args import TaskArgs, build_task
from lingua.dataloader.synthetic.stream import held_out_examples
from lingua.distributed import agree_any, dist_sum
from lingua.errors import UserError
from lingua.logger import log_on_rank_0
from lingua.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

N_EXAMPLES = 1024  # of a task
EXIT_SHARE = "loops/exit/"  # of metrics: the share of targets that leave after loop t, from 0


@dataclass
class ValidationArgs:
    # number of documents, in the order of the files, or of examples of a task; null = all, or 1,024
    max_steps: int | None = None
    use_val_from_train_src: bool = True  # use the *.val.jsonl files of data.sources
    root_dir: str = ""  # folder of additional validation sources
    # sub-folders of root_dir; empty = root_dir itself
    sources: list[str] = field(default_factory=list)
    # options of data.task to change, e.g. validation.task.n=32; null = the task of training
    task: TaskArgs | None = None

    def __post_init__(self):
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(
                f"max_steps={self.max_steps} must be at least 1, or null for all documents"
            )

    @property
    def additional(self) -> list[str]:
        """Sub-folders of `root_dir` to read, "." for `root_dir` itself."""
        return self.sources or [ROOT_SOURCE] if self.root_dir else []


def check_validation_sources(args: ValidationArgs, section: str) -> None:
    """Raise UserError for missing folders. `section` is the dotted name of `args` in the config."""
    if args.sources and not args.root_dir:
        raise UserError(
            f"{section}.root_dir={args.root_dir!r} with {section}.sources={args.sources}: sources "
            "are sub-folders of root_dir; set root_dir"
        )
    option = f"{section}.{'sources' if args.sources else 'root_dir'}"
    for source in args.additional:
        if not find_val_files(args.root_dir, [source]):
            folder = Path(args.root_dir, source)
            raise UserError(f"{option}: no *.val.jsonl in {folder} (cwd {Path.cwd()})")


@dataclass(frozen=True)
class ValidationRows:
    """Concatenated documents, split into rows of seq_len + 1 tokens.

    `tokens` (n_rows, seq_len + 1) int64 is padded with NO_TARGET. `starts`, of the same shape, is 1
    at the first token of a document. `n_bytes` is the length of the scored text in UTF-8.
    """

    tokens: np.ndarray
    starts: np.ndarray
    n_bytes: int

    def __len__(self) -> int:
        return len(self.tokens)

    def views(self, begin: int, end: int, doc_mask: bool) -> np.ndarray:
        """Return rows `begin` to `end` as the training loader yields them. Pad after the last."""
        import numpy as np

        shape = (end - begin, self.tokens.shape[1])
        tokens, starts = np.full(shape, NO_TARGET), np.zeros(shape, dtype=np.int64)
        n_rows = len(self.tokens[begin:end])
        tokens[:n_rows], starts[:n_rows] = self.tokens[begin:end], self.starts[begin:end]
        rows = zip(tokens, starts, strict=True)
        views = np.stack([view_row(row, 2, first if doc_mask else None) for row, first in rows])
        views[..., 0].clip(min=0, out=views[..., 0])  # padding must be a valid token
        return views


@dataclass(frozen=True)
class TaskRows:
    """Held-out examples of a task, (n, seq_len, 2) int64: tokens and targets."""

    examples: np.ndarray

    def __len__(self) -> int:
        return len(self.examples)

    def views(self, begin: int, end: int, doc_mask: bool) -> np.ndarray:
        """Return rows `begin` to `end`. Pad after the last."""
        import numpy as np

        views = np.zeros((end - begin, *self.examples.shape[1:]), dtype=np.int64)
        views[..., 1] = NO_TARGET
        found = self.examples[begin:end]
        views[: len(found)] = found
        return views


def task_of(args: ValidationArgs, data: DataArgs, section: str = "validation") -> TaskArgs | None:
    """Return the task of the held-out examples, or None for text.

    `section` is the dotted name of `args` in the config. UserError for options that contradict.
    """
    if data.task is None:
        if args.task is not None:
            raise UserError(f"{section}.task is set, but the run trains on text; remove it")
        return None
    if args.root_dir:
        raise UserError(
            f"{section}.root_dir={args.root_dir}: the run trains on data.task.name="
            f"{data.task.name}, which has no text; remove it"
        )
    task = data.task if args.task is None else data.task.changed_by(args.task)
    try:
        found, trained = build_task(task), build_task(data.task)
    except UserError as error:
        raise UserError(str(error).replace("data.task.", f"{section}.task.")) from None
    if found.n_tokens > trained.n_tokens:
        raise UserError(
            f"{section}.task has {found.n_tokens} tokens with these options, but the model was "
            f"trained on {trained.n_tokens}; keep the options of the vocabulary"
        )
    return task


def build_rows(documents: Iterable[tuple[list[int], int]], seq_len: int) -> ValidationRows | None:
    """Build rows from (tokens, bytes of text) pairs. None for fewer than two tokens.

    Adjacent rows share one token, so that every token except the first is a target once.
    """
    import numpy as np

    documents_tokens, starts, n_bytes = [], [], 0
    for tokens, size in documents:
        first = np.zeros(len(tokens), dtype=np.int64)
        first[:1] = 1
        documents_tokens.append(np.asarray(tokens, dtype=np.int64))
        starts.append(first)
        n_bytes += size
    n_tokens = sum(map(len, documents_tokens))
    if n_tokens < 2:
        return None
    n_rows = math.ceil((n_tokens - 1) / seq_len)

    def rows(flat: np.ndarray, fill: int) -> np.ndarray:
        padded = np.full(n_rows * seq_len + 1, fill, dtype=np.int64)
        padded[:n_tokens] = flat
        return np.stack([padded[i * seq_len : (i + 1) * seq_len + 1] for i in range(n_rows)])

    tokens = rows(np.concatenate(documents_tokens), NO_TARGET)
    return ValidationRows(tokens, rows(np.concatenate(starts), 0), n_bytes)


def find_sources(args: ValidationArgs, data: DataArgs) -> list[tuple[str, list[str]]]:
    """Return (root, sources) of the folders with validation text."""
    if data.task is not None:
        return []
    root, sources = data.root_dir, list(data.sources)
    found = []
    if args.use_val_from_train_src and root and find_val_files(root, sources):
        found.append((root, sources))
    if args.additional:
        found.append((args.root_dir, args.additional))
    return found


def format_validation(scores: Mapping[str, float]) -> str:
    """Format the scores of a validator for the log."""
    loss = f"loss {scores['loss/val']:.4f} nats per"
    if "acc/val" in scores:
        return f"{loss} answer, accuracy {scores['acc/val']:.2%}"
    return f"{loss} token, {scores['loss/val_bpb']:.4f} bits per byte"


class Validator:
    """Measures the validation loss of a model. Reads and tokenizes the text once, when needed.

    `tokenizer` may be None with data.task.
    """

    def __init__(self, args: ValidationArgs, data: DataArgs, tokenizer: Tokenizer | None):
        self.args, self.data, self.tokenizer = args, data, tokenizer

    @cached_property
    def rows(self) -> ValidationRows | TaskRows | None:
        if (task := task_of(self.args, self.data)) is not None:
            n = self.args.max_steps or N_EXAMPLES
            return TaskRows(held_out_examples(task, self.data.seed or 0, n))
        rows = build_rows(self._documents(), self.data.seq_len)
        if rows is None:
            logger.info("no *.val.jsonl in data.sources: no validation loss")
        return rows

    def _documents(self) -> Iterator[tuple[list[int], int]]:
        """Yield (tokens, bytes of scored text) for each document."""
        n_read, is_predicted = 0, False
        assert self.tokenizer is not None
        for root, sources in find_sources(self.args, self.data):
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
        loop_count: int | None = None,
        rule: ExitRule | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Return {"loss/val": nats per token, "loss/val_bpb": bits per byte}. A collective.

        With data.task it is {"loss/val": nats per answer, "acc/val": share of right answers}.

        `loop_count` is the number of loops; null = as many as inference runs. With `rule`, each
        token is predicted where it leaves, and `loops/exit/<t>` is the share of targets that leave
        after loop t, from 0. The result is empty without validation text. Each rank calls
        `should_stop` after each batch; if it is true on any rank, all ranks stop and the result is
        empty.
        """
        rows = self.rows
        if rows is None:
            return {}
        is_task = isinstance(rows, TaskRows)
        seq_len = rows.examples.shape[1] if is_task else self.data.seq_len
        log_on_rank_0("validation on %d rows of %d tokens", len(rows), seq_len)
        was_training, layout = model.training, model.inference_layout
        model.eval()
        if loop_count is not None:
            model.set_loops(loop_count)
        model.begin_step(None)
        n_loops = len(model.inference_layout)
        # nats, targets, right answers, and the targets of each exit
        sums = torch.zeros(3 + n_loops, dtype=torch.float64, device=device)
        stopped = False
        for x, target, cu_seqlens in self._batches(rows, device, rank, world_size):
            n_targets = (target != NO_TARGET).sum()
            model.n_answers = int(n_targets) if is_task else None
            if rule is None:
                loss = model(x, target, cu_seqlens)
            else:
                h, n_BT = exit_states(model, x, rule, cu_seqlens)
                loss = model.loss_of(h, target)
                sums[3:] += torch.bincount(n_BT[target != NO_TARGET] - 1, minlength=n_loops)
            means = [loss, torch.ones_like(loss), model.loop_metrics.get("acc/out", 0 * loss)]
            sums[:3] += torch.stack(means).double() * n_targets
            if stopped := agree_any(should_stop()):
                break
        model.train(was_training)
        model.inference_layout, model.n_answers = layout, None
        if stopped:
            return {}
        # The ranks of a TP group score the same rows.
        n_copies = round(dist_sum(1.0).item()) // world_size
        nats, n_targets, n_right, *exits = (dist_sum(sums) / n_copies).tolist()
        scores = {"loss/val": nats / n_targets}
        if isinstance(rows, TaskRows):
            scores["acc/val"] = n_right / n_targets
        else:
            scores["loss/val_bpb"] = nats / math.log(2) / max(rows.n_bytes, 1)
        if rule is not None:
            scores |= {f"{EXIT_SHARE}{t}": n / n_targets for t, n in enumerate(exits)}
        return scores

    def _batches(
        self, rows: ValidationRows | TaskRows, device: torch.device, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """Yield this rank's batches. Padding has no targets."""
        size = self.data.batch_size
        for first in range(0, len(rows), size * world_size):
            begin = first + rank * size
            views = rows.views(begin, begin + size, self.data.doc_mask)
            yield to_device(views, self.data.doc_mask, device)
