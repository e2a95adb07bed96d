"""Pack tokenized documents into rows, and shuffle rows into batches.

Shapes: T seq_len, V n_views, B batch_size, P prefetch_size. A row is T + V - 1 consecutive tokens,
seen through V views: view v is shifted by v tokens, so view 0 is the input and view 1 its target.
With `doc_mask`, a last column is 1 at the first token of each document, and a target that belongs
to another document than its input is NO_TARGET.

Each stage yields `(item, state)`. Rebuilt from a state, it yields the items that follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

from lingua.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

NO_TARGET = -100  # ignore_index of cross-entropy
MAX_EMPTY = 30_000  # consecutive documents without a token


class PackTokensState(TypedDict):
    it_state: Any  # of the stage before, just before the document that fills the next row
    start_token: int  # tokens of that document already used
    carry: list[int]  # the last V - 1 tokens of the row before; they start the next row
    carry_starts: list[int]  # 1 if that token is the first of its document
    output_seq_len: int  # T
    n_views: int
    doc_mask: bool


class PrefetchState(TypedDict):
    it_state: Any  # of the packing, before the first row of the current block
    rng_state: dict[str, Any]  # before the block was shuffled
    seq_idx: int  # batches of the block already yielded
    prefetch_size: int
    batch_size: int
    seed: int  # only compared with the options of a later run
    rank: int  # of the run that chose the share of the chunks
    world_size: int


def init_pack_state(
    it_state: Any, seq_len: int, n_views: int, doc_mask: bool = False
) -> PackTokensState:
    return PackTokensState(
        it_state=it_state,
        start_token=0,
        carry=[],
        carry_starts=[],
        output_seq_len=seq_len,
        n_views=n_views,
        doc_mask=doc_mask,
    )


def pack_tokens(
    iterator: Iterable[tuple[list[int], Any]], empty_buffer_state: PackTokensState
) -> Iterator[tuple[np.ndarray, PackTokensState]]:
    """Concatenate documents and cut them into rows (T, V), int64; (T, V + 1) with `doc_mask`.

    Nothing is padded or dropped. The last V - 1 tokens of a row were only targets, so they start
    the next row. The state contains them, so resuming doesn't need the document they came from.

        T = 4, V = 2, documents abc, defgh, ij     rows  abcd|e  efgh|i  ...
        with `doc_mask` their targets                    bc-e    fgh-
        and the mask column                              1001    0000
    """
    import numpy as np

    state = empty_buffer_state
    seq_len, n_views = state["output_seq_len"], state["n_views"]
    row = np.empty(seq_len + n_views - 1, dtype=np.int64)
    starts = np.zeros_like(row)  # also without `doc_mask`: it is cheap
    filled = len(state["carry"])
    row[:filled] = state["carry"]
    starts[:filled] = state["carry_starts"]
    before, used = state["it_state"], state["start_token"]
    n_empty = 0

    for tokens, after in iterator:
        tokens = np.asarray(tokens, dtype=np.int64)
        n_empty = 0 if len(tokens) else n_empty + 1
        if n_empty == MAX_EMPTY:  # otherwise a run could wait forever for a row
            raise UserError(f"data.sources: {n_empty} documents in a row have no text")
        if used > len(tokens):
            raise UserError(
                f"the data has changed since the checkpoint: it was at token {used} of a document "
                f"that has {len(tokens)} now; restore the data, or start a new run"
            )
        while used < len(tokens):
            n = min(len(row) - filled, len(tokens) - used)
            row[filled : filled + n] = tokens[used : used + n]
            starts[filled : filled + n] = 0
            starts[filled] = used == 0
            filled += n
            used += n
            if filled == len(row):
                carry, carry_starts = row[seq_len:], starts[seq_len:]
                state = PackTokensState(
                    **{
                        **state,
                        "it_state": before,
                        "start_token": used,
                        "carry": carry.tolist(),
                        "carry_starts": carry_starts.tolist(),
                    }
                )
                yield view_row(row, n_views, starts if state["doc_mask"] else None), state
                filled = len(carry)
                row[:filled], starts[:filled] = carry.copy(), carry_starts.copy()
        before, used = after, 0


def view_row(row: np.ndarray, n_views: int, starts: np.ndarray | None) -> np.ndarray:
    """Return a copy of the views (T, V) of a row of T + V - 1 tokens.

    `starts` is 1 at the first token of each document. With it, the result is (T, V + 1): targets
    don't cross documents, and the last column is `starts`.
    """
    import numpy as np

    views_TV = np.lib.stride_tricks.sliding_window_view(row, n_views)
    if starts is None:
        return views_TV.copy()
    document_TV = np.lib.stride_tricks.sliding_window_view(starts.cumsum(), n_views)
    views_TV = np.where(document_TV == document_TV[:, :1], views_TV, NO_TARGET)
    return np.concatenate([views_TV, starts[: len(views_TV), None]], axis=1)


def batch_and_shuffle_prefetched_sequences(
    data_loader: Iterator[tuple[np.ndarray, Any]],
    batch_size: int,
    prefetch_size: int,
    seq_len: int,
    n_views: int,
    state: PrefetchState,
) -> Iterator[tuple[np.ndarray, PrefetchState]]:
    """Shuffle the rows in blocks of P * B and yield them as batches (B, T, columns), int64.

    After each batch, its places in the buffer are filled with rows of the next block, so that
    reading is spread evenly. To resume, the current block is read and shuffled again, and as much
    of the next block as had been read. `n_views` is the number of columns of a row.
    """
    import numpy as np

    n_rows = prefetch_size * batch_size
    # Token ids fit in 32 bits, and the buffer takes most of the loader's memory.
    buffer = np.empty((n_rows, seq_len, n_views), dtype=np.int32)
    rng = np.random.default_rng()
    rng.bit_generator.state = state["rng_state"]
    block_state, block_rng = state["it_state"], state["rng_state"]

    # Place i of a block is row order[i] of the buffer: row numbers are shuffled, not rows.
    order = np.arange(n_rows)
    last_state = block_state

    def read(places: Iterable[int]) -> None:
        nonlocal last_state
        for place in places:
            buffer[order[place]], last_state = next(data_loader)

    read(range(n_rows))
    next_block_state = last_state
    rng.shuffle(order)
    read(range(state["seq_idx"] * batch_size))

    batch_idx = state["seq_idx"]
    while True:
        places = range(batch_idx * batch_size, (batch_idx + 1) * batch_size)
        batch = buffer[order[places]].astype(np.int64)
        batch_idx = (batch_idx + 1) % prefetch_size
        if batch_idx == 0:
            block_state, block_rng = next_block_state, rng.bit_generator.state
        progress = {"it_state": block_state, "rng_state": block_rng, "seq_idx": batch_idx}
        yield batch, PrefetchState(**{**state, **progress})
        read(places)
        if batch_idx == 0:
            next_block_state = last_state
            rng.shuffle(order)


def document_offsets(starts_BT: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Return cu_seqlens (n_documents + 1,), int32, of a batch flattened to B * T tokens.

    `starts_BT` is the mask column. Each row starts a document too, as rows don't see each other.
    Best called on the CPU: the size of the result depends on the data.
    """
    import torch

    starts_BT = torch.as_tensor(starts_BT) != 0
    first = torch.zeros_like(starts_BT)
    first[:, 0] = True
    begins = (starts_BT | first).flatten().nonzero().flatten()
    end = begins.new_tensor([starts_BT.numel()])
    return torch.cat([begins, end]).to(torch.int32)
