"""The whole chain on files: resume after every batch, with and without a worker; bad options."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lingua.args import UserError  # noqa: E402
from lingua.data import (  # noqa: E402
    DataArgs,
    build_dataloader,
    build_dataloader_from_args,
    choose_source,
    fill_in_sources,
    find_unread_folders,
    init_choice_state,
    init_dataloader_state_from_args,
    setup_sources,
    tokenize,
    validate_data_args,
)
from lingua.dataloader.packing import NO_TARGET  # noqa: E402
from lingua.dataloader.resume import check_state_matches  # noqa: E402
from lingua.tokenizer import TokenizerArgs  # noqa: E402


def make_source(folder: Path, texts: list[str], n_chunks: int = 1) -> None:
    folder.mkdir(parents=True)
    for c in range(n_chunks):
        lines = [json.dumps({"text": t}) + "\n" for t in texts[c::n_chunks]]
        (folder / f"x.chunk.{c:02d}.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    rng = random.Random(0)
    for source in ("web", "code"):
        texts = [f"{source} {i} " + "é" * rng.randint(0, 30) for i in range(40)]
        make_source(tmp_path / "data" / source, texts, n_chunks=2)
    return tmp_path / "data"


def make_args(root, **changes) -> DataArgs:
    defaults = {
        "root_dir": str(root),
        "sources": {"web": 1.0, "code": 2.0},
        "batch_size": 2,
        "seq_len": 16,
        "seed": 5,
        "prefetch_size": 3,
        "load_async": False,
    }
    return DataArgs(**{**defaults, **changes})


def read(args, n, state=None, rank=0, world_size=1):
    state = state or init_dataloader_state_from_args(args, rank, world_size)
    with build_dataloader_from_args(args, state) as stream:
        return list(islice(stream, n))


def assert_same(got, want):
    assert len(got) == len(want)
    for (batch, state), (want_batch, want_state) in zip(got, want, strict=True):
        assert batch.dtype == want_batch.dtype == np.int64
        assert batch.tolist() == want_batch.tolist()
        assert state == want_state


@given(
    n_views=st.sampled_from([1, 2, 3, 5]),
    seq_len=st.sampled_from([1, 4, 9]),
    batch_size=st.integers(1, 3),
    prefetch_size=st.integers(1, 5),
    specials=st.tuples(st.booleans(), st.booleans()),
    doc_mask=st.booleans(),
    lengths=st.lists(st.sampled_from([0, 0, 1, 2, 4, 8, 9, 18, 400]), min_size=4, max_size=9),
    weights=st.lists(st.sampled_from([0.3, 1.0, 7.0]), min_size=1, max_size=3),
    world_size=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
@settings(max_examples=150)
def test_resume_equals_the_uninterrupted_stream(
    n_views, seq_len, batch_size, prefetch_size, specials, doc_mask, lengths, weights,
    world_size, data,
):  # fmt: skip
    add_bos, add_eos = specials
    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for s, weight in enumerate(weights):
            # one text is never empty: without bos and eos there must be something to pack
            texts = ["abc" * world_size] * world_size + [chr(97 + s) * n for n in lengths]
            n_chunks = data.draw(st.integers(1, 2))
            make_source(Path(folder, str(s)), texts * n_chunks, n_chunks)
            sources[str(s)] = weight
        args = make_args(
            folder, sources=sources, n_views=n_views, seq_len=seq_len, batch_size=batch_size,
            prefetch_size=prefetch_size, add_bos=add_bos, add_eos=add_eos, doc_mask=doc_mask,
        )  # fmt: skip
        rank = data.draw(st.integers(0, world_size - 1))
        whole = read(args, 2 * prefetch_size + 4, rank=rank, world_size=world_size)
        assert whole[0][0].shape == (batch_size, seq_len, n_views + doc_mask)
        for k in range(2 * prefetch_size + 2):
            saved = json.loads(json.dumps(whole[k][1]))
            assert_same(read(args, 2, saved), whole[k + 1 : k + 3])


def test_each_stage_resumes_after_every_item(root):
    state = init_choice_state(str(root), {"web": 1.0, "code": 2.0}, seed=3, rank=0, world_size=2)

    def chosen(state):
        return choose_source(setup_sources(state), **state)

    def tokenized(state):
        return tokenize(chosen(state["it_state"]), True, False, "bytes")

    for stage, first in (
        (chosen, state),
        (tokenized, {"it_state": state}),
    ):
        whole = list(islice(stage(first), 90))
        for k in range(0, 80, 7):
            saved = json.loads(json.dumps(whole[k][1]))
            assert list(islice(stage(saved), 9)) == whole[k + 1 : k + 10]


def test_worker_and_no_worker_give_the_same_batches_and_states(root):
    args = make_args(root, n_views=3, doc_mask=True)
    want = read(args, 40)
    ahead = replace(args, load_async=True)
    assert_same(read(ahead, 40), want)
    assert_same(read(ahead, 20, json.loads(json.dumps(want[19][1]))), want[20:])


def test_the_stream_follows_from_the_seed(root):
    args = make_args(root)
    assert_same(read(args, 10), read(args, 10))
    other = replace(args, seed=6)
    assert [b.tolist() for b, _ in read(other, 10)] != [b.tolist() for b, _ in read(args, 10)]


def test_ranks_draw_different_orders(tmp_path):
    for source in ("a", "b"):
        make_source(tmp_path / source, [f"{source}{i // 2}" for i in range(40)], n_chunks=2)
    args = make_args(tmp_path, sources={"a": 1.0, "b": 1.0})
    by_rank = [[b.tolist() for b, _ in read(args, 8, None, rank, 2)] for rank in range(2)]
    assert by_rank[0] != by_rank[1]  # though they read the same texts
    states = [init_dataloader_state_from_args(args, rank, 2) for rank in range(2)]
    assert states[0]["rng_state"] != states[1]["rng_state"]


def test_all_tokens_of_an_epoch_are_read_once(tmp_path):
    texts = [f"{i:05d}" for i in range(48)]
    make_source(tmp_path / "s", texts, n_chunks=3)
    args = make_args(
        tmp_path, sources={"s": 1.0}, seq_len=6, n_views=1, add_eos=False, prefetch_size=2
    )
    seen = Counter()
    for rank in range(4):  # 12 documents per rank, each a row of bos and 5 digits
        for batch, _ in read(args, 6, None, rank, 4):
            seen.update(bytes(row[1:, 0].tolist()).decode() for row in batch)
    assert seen == Counter(texts)


def test_weights_are_shares_of_documents(tmp_path):
    make_source(tmp_path / "long", ["l" * 50] * 5)
    make_source(tmp_path / "short", ["s"] * 5)
    make_source(tmp_path / "never", ["n"] * 5)
    state = init_choice_state(str(tmp_path), {"long": 3, "short": 1, "never": 0}, 0, 0, 1)
    drawn = Counter(
        d["text"][0] for d, _ in islice(choose_source(setup_sources(state), **state), 4000)
    )
    assert drawn["n"] == 0
    assert 2880 < drawn["l"] < 3120  # 3000 +- 4 sigma


def test_doc_mask_marks_where_documents_start_and_hides_the_next_one(root):
    masked, plain = (
        np.stack([batch for batch, _ in read(make_args(root, doc_mask=m, seq_len=7), 60)])
        for m in (True, False)
    )
    (x, target, starts), (plain_x, plain_target) = (np.moveaxis(b, -1, 0) for b in (masked, plain))
    # every document starts with bos, and nothing else has one
    is_bos = plain_target == 256
    assert is_bos[..., -1].any(), "a row should end with its document"
    assert (starts == (x == 256)).all() and (x == plain_x).all()
    assert (target == np.where(is_bos, NO_TARGET, plain_target)).all()


@pytest.mark.parametrize("load_async", [False, True])
def test_a_bad_line_deep_in_a_chunk_reaches_the_parent(root, load_async):
    chunk = root / "web" / "x.chunk.01.jsonl"
    lines = chunk.read_text(encoding="utf-8").splitlines()
    lines[12] = '{"title": "no text"}'
    chunk.write_text("\n".join(lines) + "\n", encoding="utf-8")
    args = make_args(root, load_async=load_async)
    with pytest.raises(UserError, match=r"web/x\.chunk\.01\.jsonl:13: no string under"):
        read(args, 200, rank=1, world_size=2)


def test_closing_the_loader_closes_its_files(root):
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("needs /proc")

    def ours():
        return [f for f in open_files.iterdir() if "x.chunk" in str(f.resolve())]

    with build_dataloader(init_dataloader_state_from_args(make_args(root), 0, 1)) as stream:
        next(stream)
        assert ours()
    assert not ours()


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 3},
        {"prefetch_size": 4},
        {"seq_len": 17},
        {"n_views": 3},
        {"doc_mask": True},
        {"add_bos": False},
        {"add_eos": False},
        {"seed": 6},
        {"sources": {"web": 1.0}},
        {"sources": {"web": 1.0, "code": 2.5}},
        {"tokenizer": TokenizerArgs("hf", __file__)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_options_that_changed_since_the_checkpoint_are_refused(root, change):
    args = make_args(root)
    state = read(args, 1)[0][1]
    assert check_state_matches(args, state) == []
    changed = replace(args, **change)
    (difference,) = check_state_matches(changed, state)
    assert difference.startswith(f"data.{next(iter(change))}")
    with pytest.raises(UserError, match="cannot resume the data: data."):
        build_dataloader_from_args(changed, state)


def test_the_data_may_move(root, tmp_path):
    args = make_args(root)
    whole = read(args, 12)
    root.rename(tmp_path / "elsewhere")
    moved = replace(args, root_dir=str(tmp_path / "elsewhere"))
    got = read(moved, 7, json.loads(json.dumps(whole[4][1])))
    assert [b.tolist() for b, _ in got] == [b.tolist() for b, _ in whole[5:]]
    assert str(root) not in json.dumps(got[-1][1])


def test_chunks_that_changed_since_the_checkpoint_are_refused(root):
    args = make_args(root)
    state = read(args, 7)[-1][1]
    extra = root / "web" / "x.chunk.02.jsonl"
    extra.write_text('{"text": "new"}\n')
    with pytest.raises(UserError, match=r"cannot resume the data: .*x\.chunk\.02\.jsonl"):
        build_dataloader_from_args(args, state)
    extra.unlink()
    for share in state["it_state"]["it_state"]["it_state"]["source_to_state"].values():
        Path(share["file_path"]).write_text('{"text": "short"}\n')
    with pytest.raises(UserError, match="has no line that ends at byte"):
        build_dataloader_from_args(args, state)


@pytest.fixture
def alone(root):
    """A root_dir with chunks of its own, which also contains a source."""
    make_source(root / "code" / "inner", ["not read"])
    return make_args(root / "code", sources={})


def test_chunks_in_root_dir_are_the_source_if_none_is_named(root, alone):
    named = read(make_args(root, sources={"code": 1.0}), 12)
    whole = read(alone, 12)
    assert [b.tolist() for b, _ in whole] == [b.tolist() for b, _ in named]
    validate_data_args(alone, 2)
    state = json.loads(json.dumps(whole[4][1]))
    assert_same(read(alone, 7, state), whole[5:])
    filled = fill_in_sources(alone)  # as in config.yaml and params.json
    assert filled.sources == {".": 1.0} and fill_in_sources(filled) == filled
    assert_same(read(filled, 7, state), whole[5:])
    assert find_unread_folders(filled) == ["inner"]
    assert find_unread_folders(make_args(root)) == []


def test_the_source_in_root_dir_may_move_and_is_checked_like_others(root, alone):
    whole = read(alone, 6)
    state = json.loads(json.dumps(whole[2][1]))
    (root / "code").rename(root / "moved")
    moved = replace(alone, root_dir=str(root / "moved"))
    assert [b.tolist() for b, _ in read(moved, 3, state)] == [b.tolist() for b, _ in whole[3:]]
    with pytest.raises(UserError, match="cannot resume the data: data.sources is"):
        build_dataloader_from_args(make_args(root, sources={"moved": 1.0}), state)
    (root / "moved" / "x.chunk.01.jsonl").unlink()
    (root / "moved" / "x.chunk.01.jsonl").symlink_to("gone")
    for check in (lambda: validate_data_args(moved, 1), lambda: read(moved, 1, state)):
        with pytest.raises(UserError, match=r"x\.chunk\.01\.jsonl .a link to gone"):
            check()


def test_a_folder_of_downloads_names_the_shuffled_one(root):
    (root / "web").rename(root / "corpus_shuffled")
    (root / "corpus").mkdir()
    (root / "corpus" / "x.val.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="set data.root_dir=.*/corpus_shuffled"):
        validate_data_args(make_args(root / "corpus", sources={}), 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"root_dir": None}, "data.root_dir is not set"),
        ({"root_dir": "/nowhere/at/all"}, "data.root_dir=/nowhere/at/all: no such folder"),
        ({"sources": {}}, r"data.sources is empty and .*\.jsonl.*folders there: code, web"),
        ({"sources": {"wbe": 1.0}}, "no folder .*wbe"),
        ({"tokenizer": TokenizerArgs("tiktoken")}, "data.tokenizer.path is not set"),
        ({"tokenizer": TokenizerArgs("hf", "/no/file.json")}, "data.tokenizer.path=/no/file.json"),
    ],
)
def test_missing_paths_are_named_before_the_start(root, change, message):
    args = make_args(root, load_async=True, **change)
    with pytest.raises(UserError, match=message):
        validate_data_args(args, 1)


def test_more_ranks_than_lines_is_refused_on_every_rank(root):
    for rank in (0, 30, 63):
        with pytest.raises(UserError, match="x.chunk.00.jsonl has 20 lines but 32 ranks share it"):
            init_dataloader_state_from_args(make_args(root), rank, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "data.batch_size must be 1 or more, got 0"),
        ({"seq_len": -1}, "data.seq_len"),
        ({"n_views": 0}, "data.n_views"),
        ({"prefetch_size": 0}, "data.prefetch_size"),
        ({"seed": -1}, "data.seed"),
        ({"sources": {"a": -1.0}}, "data.sources.a must be 0 or more"),
        ({"sources": {"a": float("nan")}}, "data.sources.a"),
        ({"sources": {"a": 0.0}}, "all weights are 0"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        DataArgs(**change)


def test_data_without_any_text_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("lingua.dataloader.packing.MAX_EMPTY", 300)
    make_source(tmp_path / "web", ["", ""], n_chunks=1)
    args = make_args(tmp_path, sources={"web": 1.0}, add_bos=False, add_eos=False)
    with pytest.raises(UserError, match="documents in a row have no text"):
        read(args, 1)
