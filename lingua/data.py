"""Text on disk to batches of token ids, with a state that resumes the stream to the bit.

A chain of generators, each yielding `(item, state)`. A state is a plain dict that JSON can hold,
with the state of the stage before it nested inside, so a batch and all it takes to go on after it
travel together, through a worker process too. Building the chain from a state is resuming.

    loop_on_jsonl      documents of one source, without end               (dataloader/jsonl.py)
    choose_source      mixes the sources by weight, document by document
    tokenize           document -> token ids; or read as such           (dataloader/pretokenized.py)
    pack_tokens        token ids -> rows of seq_len, no padding           (dataloader/packing.py)
    batch_and_shuffle_prefetched_sequences      rows -> shuffled batches  (dataloader/packing.py)
    async_iterator     all of it in a process of its own, ahead of time   (dataloader/prefetch.py)

Example: `root_dir: data, sources: {web: 3, code: 1}`, 8 ranks, 2 chunks in each source. Ranks 0-3
share the first chunk of `web` and take its lines in turn, ranks 4-7 the second; the same in `code`.
Three of four documents, on average, come from `web`. A rank's documents are laid end to end, cut
into rows of `seq_len` tokens, shuffled in blocks of `prefetch_size` batches, and yielded as int64
arrays (batch_size, seq_len, n_views), with one column more under `doc_mask`.

Ranks here are data-parallel ranks; ranks that share a batch read the same data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import (
    TRAIN_PATTERN,
    ChunksState,
    JSONLState,
    ReadFile,
    distribute_data_to_rank,
    document_text,
    find_and_sanitize_chunks,
    find_val_files,
    iter_val_documents,
    loop_on_jsonl,
    read_jsonl,
)
from lingua.dataloader.packing import (
    PackTokensState,
    PrefetchState,
    batch_and_shuffle_prefetched_sequences,
    document_offsets,
    init_pack_state,
    pack_tokens,
)
from lingua.dataloader.prefetch import async_iterator, consume_buffer, feed_buffer
from lingua.dataloader.pretokenized import TokenRecipe, check_token_files, read_tokens
from lingua.dataloader.reshard import DataState, is_resharded, open_resharded
from lingua.dataloader.resume import check_state_matches, fit_state_to_args
from lingua.errors import UserError
from lingua.tokenizer import TokenizerArgs, build_tokenizer, find_tokenizer_file

__all__ = [
    "DataArgs",
    "JSONLState",
    "MultiChoiceState",
    "PackTokensState",
    "PrefetchState",
    "TokenizerArgs",
    "TokenizerState",
    "async_iterator",
    "batch_and_shuffle_prefetched_sequences",
    "build_dataloader",
    "build_dataloader_from_args",
    "check_state_matches",
    "choose_source",
    "consume_buffer",
    "distribute_data_to_rank",
    "document_offsets",
    "feed_buffer",
    "find_and_sanitize_chunks",
    "find_val_files",
    "init_choice_state",
    "init_dataloader_state_from_args",
    "init_state",
    "iter_val_documents",
    "loop_on_jsonl",
    "pack_tokens",
    "read_jsonl",
    "setup_sources",
    "tokenize",
    "validate_data_args",
]

# Batches that the worker holds ready. They even out slow reads; the shuffling has its own buffer.
MAX_BATCHES_AHEAD = 16


class MultiChoiceState(TypedDict):
    root_dir: str
    sources: dict[str, float]
    source_to_state: dict[str, ChunksState]
    rng_state: dict[str, Any]  # of numpy's PCG64, after the draw of the last document


class TokenizerState(TypedDict):
    it_state: MultiChoiceState
    name: str
    add_bos: bool
    add_eos: bool
    path: str | None


def choose_source(
    source_to_iterator: Mapping[str, Iterator[tuple[dict[str, Any], ChunksState]]],
    source_to_state: dict[str, ChunksState],
    root_dir: str,
    sources: dict[str, float],
    rng_state: dict[str, Any],
) -> Iterator[tuple[dict[str, Any], MultiChoiceState]]:
    """Draw a source for every document, with odds in proportion to the weights."""
    import numpy as np

    names = list(sources)
    weights = np.array([sources[name] for name in names], dtype=np.float64)
    odds = weights / weights.sum()
    rng = np.random.default_rng()
    rng.bit_generator.state = rng_state
    while True:
        name = names[rng.choice(len(names), p=odds)]
        document, state = next(source_to_iterator[name])
        source_to_state = {**source_to_state, name: state}
        yield (
            document,
            MultiChoiceState(
                root_dir=root_dir,
                sources=sources,
                source_to_state=source_to_state,
                rng_state=rng.bit_generator.state,
            ),
        )


def tokenize(
    iterator: Iterator[tuple[dict[str, Any], Any]],
    add_bos: bool,
    add_eos: bool,
    tokenizer_type: str,
    tokenizer_path: str | None = None,
) -> Iterator[tuple[list[int], TokenizerState]]:
    # built here, so in the worker where there is one
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_path)
    for document, state in iterator:
        yield (
            tokenizer.encode(document_text(document), add_bos, add_eos),
            TokenizerState(
                it_state=state,
                name=tokenizer_type,
                add_bos=add_bos,
                add_eos=add_eos,
                path=tokenizer_path,
            ),
        )


def already_tokenized(
    iterator: Iterator[tuple[Any, Any]], state: TokenizerState
) -> Iterator[tuple[Any, TokenizerState]]:
    """What `tokenize` would yield, of documents that are token ids."""
    for tokens, it_state in iterator:
        yield tokens, TokenizerState(**{**state, "it_state": it_state})


def setup_sources(
    multi_state: MultiChoiceState, read: ReadFile = read_jsonl
) -> dict[str, Iterator[Any]]:
    return {
        source: loop_on_jsonl(**state, read=read)
        for source, state in multi_state["source_to_state"].items()
    }


def build_dataloader(
    state: DataState, pretokenized: bool = False
) -> AbstractContextManager[Iterator[tuple[Any, DataState]]]:
    """The loader that goes on from `state`, of this rank's own stream or of several dealt ones."""
    build = partial(open_stream, pretokenized=pretokenized)
    return (
        open_resharded(state, build) if is_resharded(state) else build(cast(PrefetchState, state))
    )


@contextmanager
def open_stream(
    state: PrefetchState, pretokenized: bool = False
) -> Iterator[Iterator[tuple[Any, PrefetchState]]]:
    """The chain of generators that goes on from `state`; their files are closed at the end."""
    pack_state: PackTokensState = state["it_state"]
    tokenizer_state: TokenizerState = pack_state["it_state"]
    multi_state: MultiChoiceState = tokenizer_state["it_state"]
    with ExitStack() as stack:
        documents = setup_sources(multi_state, read_tokens if pretokenized else read_jsonl)
        for iterator in documents.values():
            stack.enter_context(closing(iterator))  # type: ignore[type-var]
        mixed = choose_source(documents, **multi_state)
        if pretokenized:
            tokens = already_tokenized(mixed, tokenizer_state)
        else:
            tokens = tokenize(
                mixed,
                tokenizer_state["add_bos"],
                tokenizer_state["add_eos"],
                tokenizer_state["name"],
                tokenizer_state["path"],
            )
        rows = pack_tokens(tokens, pack_state)
        yield batch_and_shuffle_prefetched_sequences(
            rows,
            state["batch_size"],
            state["prefetch_size"],
            pack_state["output_seq_len"],
            pack_state["n_views"] + pack_state["doc_mask"],
            state,
        )


def init_choice_state(
    root_dir: str,
    sources: dict[str, float],
    seed: int,
    rank: int,
    world_size: int,
    file_pattern: str = TRAIN_PATTERN,
) -> MultiChoiceState:
    return MultiChoiceState(
        root_dir=root_dir,
        sources=dict(sources),
        source_to_state={
            source: distribute_data_to_rank(
                str(Path(root_dir, source)), rank, world_size, file_pattern
            )
            for source in sources
        },
        rng_state=_rng_state(seed, rank, world_size),
    )


def init_state(
    root_dir: str,
    sources: dict[str, float],
    batch_size: int,
    prefetch_size: int,
    seq_len: int,
    n_views: int,
    seed: int,
    rank: int,
    world_size: int,
    add_bos: bool,
    add_eos: bool,
    tokenizer_name: str,
    tokenizer_path: str | None = None,
    file_pattern: str = TRAIN_PATTERN,
    doc_mask: bool = False,
) -> PrefetchState:
    choice_state = init_choice_state(root_dir, sources, seed, rank, world_size, file_pattern)
    tokenizer_state = TokenizerState(
        it_state=choice_state,
        name=tokenizer_name,
        add_bos=add_bos,
        add_eos=add_eos,
        path=tokenizer_path,
    )
    return PrefetchState(
        it_state=init_pack_state(tokenizer_state, seq_len, n_views, doc_mask),
        rng_state=_rng_state(seed + 1, rank, world_size),  # not that of the choice of sources
        seq_idx=0,
        prefetch_size=prefetch_size,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def _rng_state(seed: int, rank: int, world_size: int) -> dict[str, Any]:
    import numpy as np

    return np.random.default_rng((seed, rank, world_size)).bit_generator.state  # type: ignore


def init_dataloader_state_from_args(args: DataArgs, rank: int, world_size: int) -> PrefetchState:
    """Where `rank` of `world_size` data-parallel ranks begins."""
    assert args.seed is not None, "give data.seed the top-level seed before building the loader"
    return init_state(
        root_dir=require_root_dir(args),
        sources=args.sources,
        batch_size=args.batch_size,
        prefetch_size=args.prefetch_size,
        seq_len=args.seq_len,
        n_views=args.n_views,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
        add_bos=args.add_bos,
        add_eos=args.add_eos,
        tokenizer_name=args.tokenizer.name,
        tokenizer_path=args.tokenizer.path,
        doc_mask=args.doc_mask,
    )


def build_dataloader_from_args(
    args: DataArgs, state: DataState | None = None
) -> AbstractContextManager[Iterator[tuple[Any, DataState]]]:
    """A context manager that opens an endless iterator of `(batch, state)`.

    `state` comes from `init_dataloader_state_from_args`, or came with a batch: then the iterator
    goes on after that batch. A state that does not fit `args` or the files is refused here.
    """
    if state is None:
        state = init_dataloader_state_from_args(args, rank=0, world_size=1)
    else:
        require_root_dir(args)
        find_tokenizer_file(args.tokenizer.name, args.tokenizer.path)
        state = fit_state_to_args(args, state)
    if args.pretokenized:
        require_token_files(args, 1)
    if args.load_async:
        ahead = min(args.prefetch_size, MAX_BATCHES_AHEAD)
        return async_iterator(ahead, partial(build_dataloader, state, args.pretokenized))
    return build_dataloader(state, args.pretokenized)


def validate_data_args(args: DataArgs, world_size: int) -> None:
    """Refuse what can be seen cheaply: folders, chunks, their first lines, the tokenizer's file.

    It reads the same on every rank, so all ranks stop with the same message.
    """
    find_tokenizer_file(args.tokenizer.name, args.tokenizer.path)
    root_dir = require_root_dir(args)
    for source in args.sources:
        find_and_sanitize_chunks(str(Path(root_dir, source)), world_size)
    if args.pretokenized:
        require_token_files(args, world_size)


def require_token_files(args: DataArgs, world_size: int) -> None:
    recipe = TokenRecipe.of(args.tokenizer.name, args.tokenizer.path, args.add_bos, args.add_eos)
    for source in args.sources:
        folder = str(Path(require_root_dir(args), source))
        check_token_files(find_and_sanitize_chunks(folder, world_size), recipe)


def require_root_dir(args: DataArgs) -> str:
    if not args.root_dir:
        raise UserError("data.root_dir is not set: give the folder that holds the sources")
    root = Path(args.root_dir)
    if not root.is_dir():
        raise UserError(f"data.root_dir={args.root_dir}: no such folder (seen from {Path.cwd()})")
    if not args.sources:
        found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise UserError(
            f"data.sources is empty: name folders of {root} with weights, for example "
            f"data.sources.NAME=1 (folders there: {found})"
        )
    return args.root_dir
