"""Turn text on disk into batches of token ids, with a state that resumes the stream exactly.

The loader is a chain of generators that yield `(item, state)`. A state is a plain dict that JSON
can hold, and contains the state of the stage before it. So a batch travels with everything that is
needed to resume after it, also through a worker process. To resume, build the chain from a state.

    loop_on_jsonl      documents of one source, forever                   (dataloader/jsonl.py)
    choose_source      mixes the sources by weight, document by document
    tokenize           document -> token ids; or reads token ids        (dataloader/pretokenized.py)
    pack_tokens        token ids -> rows of seq_len, no padding           (dataloader/packing.py)
    batch_and_shuffle_prefetched_sequences      rows -> shuffled batches  (dataloader/packing.py)
    async_iterator     runs the chain ahead in a worker process           (dataloader/prefetch.py)

With `data.task`, synthetic examples take the place of the chain   (dataloader/synthetic/stream.py).

Example: `root_dir: data, sources: {web: 3, code: 1}`, 8 ranks, 2 chunks in each source. Ranks 0-3
share the first chunk of `web` and take its lines round-robin; ranks 4-7 share the second; the same
for `code`. Three of four documents, on average, come from `web`. A rank's documents are
concatenated, cut into rows of `seq_len` tokens, shuffled in blocks of `prefetch_size` batches, and
yielded as int64 arrays (batch_size, seq_len, n_views), with one more column if `doc_mask`.

Ranks here are data-parallel ranks; tensor-parallel ranks of one data-parallel rank read the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import (  # noqa: F401
    TRAIN_PATTERN,
    ChunksState,
    JSONLState,
    ReadFile,
    distribute_data_to_rank,
    document_text,
    find_and_sanitize_chunks,
    how_to_prepare,
    loop_on_jsonl,
    read_jsonl,
)
from lingua.dataloader.packing import (
    PackTokensState,
    PrefetchState,
    batch_and_shuffle_prefetched_sequences,
    init_pack_state,
    pack_tokens,
)
from lingua.dataloader.prefetch import async_iterator, consume_buffer, feed_buffer  # noqa: F401
from lingua.dataloader.pretokenized import TokenRecipe, check_token_files, read_tokens
from lingua.dataloader.reshard import (
    DataState,
    SourceState,
    is_resharded,
    open_resharded,
    streams_of,
)
from lingua.dataloader.resume import fit_state_to_args
from lingua.dataloader.synthetic.args import build_task, options_of
from lingua.dataloader.synthetic.stream import TaskState, task_batches
from lingua.errors import UserError
from lingua.files.listing import list_names
from lingua.tokenizer import TokenizerArgs, build_tokenizer, find_tokenizer_file  # noqa: F401

# Batches that the worker holds ready, to even out slow reads. Shuffling has its own buffer.
MAX_BATCHES_AHEAD = 16
ROOT_SOURCE = "."  # name of the source that is root_dir itself


class MultiChoiceState(TypedDict):
    root_dir: str
    sources: dict[str, float]
    source_to_state: dict[str, ChunksState]
    rng_state: dict[str, Any]  # of numpy's PCG64, after the last draw


class TokenizerState(TypedDict):
    it_state: MultiChoiceState
    name: str
    add_bos: bool
    add_eos: bool
    path: str | None


def choose_source(
    source_to_iterator: Mapping[str, Iterator[tuple[Any, ChunksState]]],
    source_to_state: dict[str, ChunksState],
    root_dir: str,
    sources: dict[str, float],
    rng_state: dict[str, Any],
) -> Iterator[tuple[Any, MultiChoiceState]]:
    """Draw a source for every document, with probabilities proportional to the weights."""
    import numpy as np

    names = list(sources)
    weights = np.array([sources[name] for name in names], dtype=np.float64)
    probabilities = weights / weights.sum()
    rng = np.random.default_rng()
    rng.bit_generator.state = rng_state
    while True:
        name = names[rng.choice(len(names), p=probabilities)]
        document, state = next(source_to_iterator[name])
        source_to_state = {**source_to_state, name: state}
        after = MultiChoiceState(
            root_dir=root_dir,
            sources=sources,
            source_to_state=source_to_state,
            rng_state=rng.bit_generator.state,
        )
        yield document, after


def tokenize(
    iterator: Iterator[tuple[dict[str, Any], Any]],
    add_bos: bool,
    add_eos: bool,
    tokenizer_type: str,
    tokenizer_path: str | None = None,
) -> Iterator[tuple[list[int], TokenizerState]]:
    """Tokenize documents. The tokenizer is built on first use, so in the worker process."""
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_path)
    for document, state in iterator:
        after = TokenizerState(
            it_state=state,
            name=tokenizer_type,
            add_bos=add_bos,
            add_eos=add_eos,
            path=tokenizer_path,
        )
        yield tokenizer.encode(document_text(document), add_bos, add_eos), after


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
    """Open the loader that resumes from `state`: one stream, or several after resharding."""
    build = partial(open_stream, pretokenized=pretokenized)
    if is_resharded(state):
        return open_resharded(state, build)
    return build(cast(SourceState, state))


@contextmanager
def open_stream(
    state: SourceState, pretokenized: bool = False
) -> Iterator[Iterator[tuple[Any, SourceState]]]:
    """Open one stream, built from `state`; close its files at the end."""
    if "task" in state:
        yield task_batches(cast(TaskState, state))
        return
    state = cast(PrefetchState, state)
    pack_state: PackTokensState = state["it_state"]
    tokenizer_state: TokenizerState = pack_state["it_state"]
    multi_state: MultiChoiceState = tokenizer_state["it_state"]
    with ExitStack() as stack:
        documents = setup_sources(multi_state, read_tokens if pretokenized else read_jsonl)
        for iterator in documents.values():
            stack.enter_context(closing(iterator))  # type: ignore[type-var]
        mixed = choose_source(documents, **multi_state)
        if pretokenized:
            tokens = (
                (ids, TokenizerState(**{**tokenizer_state, "it_state": after}))
                for ids, after in mixed
            )
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
        rng_state=_rng_state(seed + 1, rank, world_size),  # differs from the one of choose_source
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


def init_dataloader_state_from_args(args: DataArgs, rank: int, world_size: int) -> SourceState:
    """Return the state in which `rank` of `world_size` data-parallel ranks starts."""
    args = fill_in_sources(args)
    assert args.seed is not None, "set data.seed to the top-level seed before building the loader"
    if args.task is not None:
        return TaskState(
            task=options_of(build_task(args.task)),
            seed=args.seed,
            batch_size=args.batch_size,
            rank=rank,
            world_size=world_size,
            n_batches=0,
        )
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
    """Return a context manager that opens an endless iterator of `(batch, state)`.

    `state` is from `init_dataloader_state_from_args`, or came with a batch: then the iterator
    resumes after that batch. UserError if the state doesn't fit `args` or the files.
    """
    if state is None:
        state = init_dataloader_state_from_args(args, rank=0, world_size=1)
    else:
        args = fill_in_sources(args)
        if args.task is None:
            require_root_dir(args)
            find_tokenizer_file(args.tokenizer.name, args.tokenizer.path)
        state = fit_state_to_args(args, state)
    if args.pretokenized and args.task is None:
        check_own_token_files(args, state)
    if args.load_async:
        ahead = min(args.prefetch_size, MAX_BATCHES_AHEAD)
        return async_iterator(ahead, partial(build_dataloader, state, args.pretokenized))
    return build_dataloader(state, args.pretokenized)


def validate_data_args(args: DataArgs, world_size: int) -> None:
    """Check what is cheap: folders, chunks and their first lines, tokenizer and token files.

    Every rank does the same checks, so all ranks raise the same UserError.
    """
    if args.task is not None:  # checked with the options
        return
    find_tokenizer_file(args.tokenizer.name, args.tokenizer.path)
    args = fill_in_sources(args)
    root_dir = require_root_dir(args)
    recipe = TokenRecipe.of(args) if args.pretokenized else None
    for source in args.sources:
        chunks = find_and_sanitize_chunks(str(Path(root_dir, source)), world_size)
        if recipe is not None:
            check_token_files(chunks, recipe, may_hash=False)


def check_own_token_files(args: DataArgs, state: DataState) -> None:
    """Check the token files that a rank reads.

    Hashing a large chunk takes minutes. So only the rank that reads its first line may hash it.
    """
    recipe = TokenRecipe.of(args)
    for stream in cast(list[PrefetchState], streams_of(state)):
        multi_state: MultiChoiceState = stream["it_state"]["it_state"]["it_state"]
        for share in multi_state["source_to_state"].values():
            for place in (share, *share["waiting"]):
                check_token_files([place["file_path"]], recipe, may_hash=place["offset"] == 0)


def fill_in_sources(args: DataArgs) -> DataArgs:
    """Return `args` with root_dir as the only source if `sources` is empty and it has chunks."""
    if args.sources or not args.root_dir or not list_names(Path(args.root_dir), TRAIN_PATTERN):
        return args
    return replace(args, sources={ROOT_SOURCE: 1.0})


def find_unread_folders(args: DataArgs) -> list[str]:
    """Return the folders in root_dir with chunks, if only the chunks in root_dir itself are read.

    `args.sources` must be filled in.
    """
    root = Path(args.root_dir or "")
    if list(args.sources) != [ROOT_SOURCE] or not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if list_names(p, TRAIN_PATTERN))


def require_root_dir(args: DataArgs) -> str:
    """Return `args.root_dir`. UserError if it is no folder or `args.sources` is empty."""
    if not args.root_dir:
        raise UserError("data.root_dir is not set: give the folder that contains the sources")
    root = Path(args.root_dir)
    if not root.is_dir():
        advice = f"; {how_to_prepare(root)}" if root.is_file() else f" (seen from {Path.cwd()})"
        raise UserError(f"data.root_dir={args.root_dir}: no such folder{advice}")
    if not args.sources:
        found = sorted(p.name for p in root.iterdir() if list_names(p, TRAIN_PATTERN))
        shuffled = root.with_name(f"{root.name}_shuffled")  # of apps/LT2/scripts/prepare.py
        if list_names(shuffled, TRAIN_PATTERN):
            advice = f"set data.root_dir={shuffled}"
        elif found:
            advice = (
                f"name folders of {root} with weights, for example data.sources.NAME=1 (folders "
                f"there: {', '.join(found)})"
            )
        else:
            advice = how_to_prepare(root)
        raise UserError(f"data.sources is empty and {root} has no {TRAIN_PATTERN}: {advice}")
    return args.root_dir
