"""Rows and batches equal plain lists and resume at every position, for all document lengths."""

from __future__ import annotations

import json
from itertools import count, islice

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lingua.args import UserError  # noqa: E402
from lingua.dataloader.packing import (  # noqa: E402
    NO_TARGET,
    PrefetchState,
    batch_and_shuffle_prefetched_sequences,
    document_offsets,
    init_pack_state,
    pack_tokens,
)

SEQ_LENS = st.sampled_from([1, 2, 4, 7])
N_VIEWS = st.sampled_from([1, 2, 3, 5])


@st.composite
def documents_for(draw, seq_len):
    """Documents of length 0, 1, multiples of a row, one more, and 20 rows."""
    multiples = st.integers(1, 3).map(lambda n: n * seq_len)
    lengths = st.one_of(
        st.sampled_from([0, 1]),
        multiples,
        multiples.map(lambda n: n + 1),
        st.integers(0, 3 * seq_len),
        st.just(20 * seq_len),
    )
    chosen = draw(st.lists(lengths, min_size=1, max_size=8))
    chosen[draw(st.integers(0, len(chosen) - 1))] = 3 * seq_len + 2  # enough for one row
    tokens = count()
    return [list(islice(tokens, n)) for n in chosen]


def stage(documents, state=0):
    """Repeat the documents; a state is the number of documents so far."""
    for i in count(state):
        yield documents[i % len(documents)], i + 1


def flat(documents, n):
    tokens, starts = [], []
    for document, _ in stage(documents):
        if len(tokens) >= n:
            return tokens[:n], starts[:n]
        tokens += document
        starts += [1] * bool(document) + [0] * (len(document) - 1)


@given(st.data(), SEQ_LENS, N_VIEWS, st.booleans())
def test_rows_are_windows_of_the_joined_documents(data, seq_len, n_views, doc_mask):
    documents = data.draw(documents_for(seq_len))
    n_rows = 15
    tokens, starts = flat(documents, n_rows * seq_len + n_views)

    state = init_pack_state(0, seq_len, n_views, doc_mask)
    rows = [row for row, _ in islice(pack_tokens(stage(documents), state), n_rows)]

    for i, row in enumerate(rows):
        want = [[tokens[i * seq_len + t + v] for v in range(n_views)] for t in range(seq_len)]
        if doc_mask:
            for t, views in enumerate(want):
                place = i * seq_len + t
                ends = [place + v for v in range(1, n_views) if starts[place + v]]
                n_own = ends[0] - place if ends else n_views
                views[n_own:] = [NO_TARGET] * (n_views - n_own)
                views.append(starts[place])
        assert row.tolist() == want
        assert row.dtype == np.int64


@given(st.data(), SEQ_LENS, N_VIEWS, st.booleans())
def test_packing_resumes_after_every_row(data, seq_len, n_views, doc_mask):
    documents = data.draw(documents_for(seq_len))
    state = init_pack_state(0, seq_len, n_views, doc_mask)
    whole = list(islice(pack_tokens(stage(documents), state), 16))

    for k, (_, saved) in enumerate(whole[:12]):
        saved = json.loads(json.dumps(saved))
        resumed = pack_tokens(stage(documents, saved["it_state"]), saved)
        for (row, new_state), (want, want_state) in zip(
            islice(resumed, 4), whole[k + 1 :], strict=False
        ):
            assert row.tolist() == want.tolist()
            assert new_state == want_state


def test_no_token_predicts_another_document():
    documents = [[10, 11, 12], [20], [], [30, 31, 32, 33, 34]]
    rows = pack_tokens(stage(documents), init_pack_state(0, 4, 2, doc_mask=True))
    first, second, third = (next(rows)[0] for _ in range(3))
    assert first[:, 0].tolist() == [10, 11, 12, 20] and first[:, 2].tolist() == [1, 0, 0, 1]
    assert second[:, 0].tolist() == [30, 31, 32, 33] and second[:, 2].tolist() == [1, 0, 0, 0]
    # this row continues the document of the previous row
    assert third[:, 0].tolist() == [34, 10, 11, 12] and third[:, 2].tolist() == [0, 1, 0, 0]
    assert first[:, 1].tolist() == [11, 12, NO_TARGET, NO_TARGET]  # inside the row, and at its end
    assert second[:, 1].tolist() == [31, 32, 33, 34] and third[0, 1] == NO_TARGET


def test_a_document_shorter_than_the_saved_position_is_refused():
    state = {**init_pack_state(0, 4, 2), "start_token": 5}
    with pytest.raises(UserError, match="token 5 of a document that has 3 now"):
        next(pack_tokens(stage([[1, 2, 3]]), state))


def rows_from(state, seq_len=3, columns=2):
    for i in count(state):
        yield np.arange(seq_len * columns).reshape(seq_len, columns) + 100 * i, i + 1


def shuffled(state, batch_size, prefetch_size):
    return batch_and_shuffle_prefetched_sequences(
        rows_from(state["it_state"]), batch_size, prefetch_size, 3, 2, state
    )


def fresh_state(batch_size, prefetch_size, seed=7):
    return PrefetchState(
        it_state=0,
        rng_state=np.random.default_rng(seed).bit_generator.state,
        seq_idx=0,
        prefetch_size=prefetch_size,
        batch_size=batch_size,
        seed=seed,
        rank=0,
        world_size=1,
    )


@given(batch_size=st.integers(1, 4), prefetch_size=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_each_block_holds_its_rows_once_and_resumes_anywhere(batch_size, prefetch_size, seed):
    state = fresh_state(batch_size, prefetch_size, seed)
    n = 3 * prefetch_size + 2
    whole = list(islice(shuffled(state, batch_size, prefetch_size), n))

    size = batch_size * prefetch_size
    ids = [int(row[0, 0]) // 100 for batch, _ in whole for row in batch]
    for block in range(3):
        assert sorted(ids[block * size : (block + 1) * size]) == list(
            range(block * size, (block + 1) * size)
        )
    assert whole[0][0].dtype == np.int64

    for k, (_, saved) in enumerate(whole):
        saved = json.loads(json.dumps(saved))
        resumed = list(islice(shuffled(saved, batch_size, prefetch_size), n - k - 1))
        for (batch, new_state), (want, want_state) in zip(resumed, whole[k + 1 :], strict=True):
            assert batch.tolist() == want.tolist()
            assert new_state == want_state


def test_rows_are_shuffled_and_blocks_differ():
    whole = list(islice(shuffled(fresh_state(4, 16), 4, 16), 32))
    ids = [int(row[0, 0]) // 100 for batch, _ in whole for row in batch]
    first, second = ids[:64], [i - 64 for i in ids[64:]]
    assert first != sorted(first) and second != sorted(second) and first != second


def test_a_yielded_batch_is_not_overwritten_later():
    stream = shuffled(fresh_state(2, 2), 2, 2)
    batch, _ = next(stream)
    kept = batch.copy()
    for _ in range(5):
        next(stream)
    assert (batch == kept).all()


@pytest.mark.parametrize(
    "starts, want",
    [
        ([[1, 0, 0, 1], [1, 0, 0, 0]], [0, 3, 4, 8]),
        ([[0, 0, 0, 0], [0, 0, 1, 0]], [0, 4, 6, 8]),  # both rows continue a document
        ([[0]], [0, 1]),
    ],
)
def test_document_offsets(starts, want):
    import torch

    got = document_offsets(torch.tensor(starts))
    assert got.dtype == torch.int32
    assert got.tolist() == want
    assert document_offsets(np.array(starts)).tolist() == want
