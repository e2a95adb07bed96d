"""The validation loss against its definition, on one and two ranks."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from apps.LT2.evaluation.validation import ValidationArgs, Validator, check_validation_sources
from lingua.dataloader.args import DataArgs
from lingua.errors import UserError
from lingua.tokenizer import build_tokenizer
from tests.lingua.dist_utils import run_ranks
from tests.lingua.tokenizer_kinds import TOKENIZER_KINDS, make_tokenizer
from tests.LT2.tiny import tiny_model

TEXTS = ["a loop", "äöü over two bytes", "", "the last one ends in the middle of a row"]
SEQ_LEN = 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.val.jsonl").write_text("".join(lines[:1]))
    (folder / "b.val.jsonl").write_text("".join(lines[1:]))
    (folder / "text.chunk.00.jsonl").write_text(lines[0])
    return folder.parent


def validator(root, args=None, **changes) -> Validator:
    options = {"batch_size": 2, "seq_len": SEQ_LEN, "sources": {"text": 1.0}, **changes}
    data = DataArgs(root_dir=str(root), **options)
    return Validator(args or ValidationArgs(), data, build_tokenizer("bytes"))


def score(root, rank=0, world_size=1, args=None, **changes) -> dict[str, float]:
    model = tiny_model("hybrid", 2)
    return validator(root, args, **changes)(model, device=CPU, rank=rank, world_size=world_size)


def nats_by_definition(documents: list[list[int]], doc_mask: bool) -> tuple[float, int]:
    """Return the sum of -log p over all targets, and the number of targets."""
    model = tiny_model("hybrid", 2)
    flat = [(token, i) for i, document in enumerate(documents) for token in document]
    nats, n_targets = 0.0, 0
    for start in range(0, len(flat) - 1, SEQ_LEN):
        row = flat[start : start + SEQ_LEN + 1]
        ids = {i for _, i in row} if doc_mask else {None}
        for document in ids:
            tokens = [token for token, i in row if document in (None, i)]
            if len(tokens) < 2:
                continue
            with torch.no_grad():
                log_p = model(torch.tensor([tokens[:-1]])).double().log_softmax(-1)
            nats -= log_p[0, torch.arange(len(tokens) - 1), tokens[1:]].sum().item()
            n_targets += len(tokens) - 1
    return nats, n_targets


@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize("doc_mask", [False, True])
def test_loss_matches_its_definition(root, doc_mask, specials):
    encode = build_tokenizer("bytes").encode
    documents = [encode(text, specials, specials) for text in TEXTS]
    n_tokens = sum(map(len, documents))
    assert (n_tokens - 1) % SEQ_LEN, "the last row should be partial"
    nats, n_targets = nats_by_definition(documents, doc_mask)
    if not doc_mask:
        assert n_targets == n_tokens - 1

    scores = score(root, doc_mask=doc_mask, add_bos=specials, add_eos=specials)

    n_bytes = sum(len(text.encode()) for text in TEXTS)
    if not specials:  # nothing predicts the first character; "ä" has two bytes
        n_bytes -= 2 if doc_mask else 1
    assert scores["loss/val"] == pytest.approx(nats / n_targets, rel=1e-6)
    assert scores["loss/val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_an_empty_text_does_not_predict_the_next(tmp_path):
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in ("", "a loop")]
    (tmp_path / "text" / "a.val.jsonl").write_text("".join(lines))
    rows = validator(tmp_path, add_bos=False, add_eos=False).rows
    assert rows is not None and rows.n_bytes == len("a loop") - 1


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("doc_mask", [False, True])
def test_bytes_of_every_tokenizer(kind, doc_mask, tmp_path, monkeypatch):
    """Without BOS nothing predicts the first token, so its bytes do not count."""
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    monkeypatch.setattr("sentencepiece._protobuf_loaded", False, raising=False)
    texts = ["the function returns", "is it", "a list"]
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "text" / "a.val.jsonl").write_text("".join(lines))
    tokenizer = make_tokenizer(kind)
    options = {"seq_len": SEQ_LEN, "doc_mask": doc_mask, "add_bos": False}
    data = DataArgs(root_dir=str(tmp_path), sources={"text": 1.0}, **options)
    rows = Validator(ValidationArgs(), data, tokenizer).rows
    n_bytes = sum(map(len, texts))
    for text in texts if doc_mask else texts[:1]:
        first = tokenizer.decode(tokenizer.encode(text, False, False)[:1]).strip()
        after = text[len(first) :]
        if kind == "wordpiece":  # it drops the blank, which then belongs to the word before it
            first += after[: len(after) - len(after.lstrip())]
        n_bytes -= len(first)
    assert rows is not None and rows.n_bytes == n_bytes


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_loss_does_not_depend_on_the_batch_size(root, batch_size):
    assert score(root, batch_size=batch_size) == pytest.approx(score(root), rel=1e-6)


def score_on_rank(rank, world_size, root):
    return [score(root, rank, world_size, doc_mask=m, batch_size=b) for m, b in BATCHES]


BATCHES = [(False, 2), (True, 2), (False, 50)]  # with 50 rows, rank 1 has only padding


def test_two_ranks_agree_with_one(root):
    want = [score(root, doc_mask=doc_mask) for doc_mask, _ in BATCHES]
    for scores in run_ranks(2, score_on_rank, root):
        for got, expected in zip(scores, want, strict=True):
            assert got == pytest.approx(expected, rel=1e-6)


def stop_on_rank(rank, world_size, root):
    """Rank 1 stops after its second batch."""
    model, asked = tiny_model("hybrid", 2).train(), []

    def should_stop() -> bool:
        asked.append(rank)
        return rank == 1 and len(asked) == 2

    place = {"device": CPU, "rank": rank, "world_size": world_size}
    return validator(root)(model, **place, should_stop=should_stop), len(asked), model.training


def test_all_ranks_stop_with_the_first(root):
    assert run_ranks(2, stop_on_rank, root) == [({}, 2, True)] * 2


def test_no_text_has_no_loss(tmp_path):
    (tmp_path / "text").mkdir()
    assert score(tmp_path) == {}
    (tmp_path / "text" / "text.val.jsonl").write_text('{"text": ""}\n')
    assert score(tmp_path, add_bos=False, add_eos=False) == {}
    (tmp_path / "text" / "text.val.jsonl").write_text("")
    with pytest.raises(UserError, match="text.val.jsonl is empty"):
        score(tmp_path)


def test_max_steps_and_additional_sources(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.val.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    elsewhere = ValidationArgs(
        use_val_from_train_src=False, root_dir=str(tmp_path), sources=["other"]
    )
    first = score(root, args=ValidationArgs(max_steps=1))
    assert first == score(root, args=elsewhere)
    assert first != score(root)
    folder = ValidationArgs(use_val_from_train_src=False, root_dir=str(other))
    assert first == score(root, args=folder)
    check_validation_sources(folder, "validation")
    assert score(root) == score(root / "text", sources={".": 1.0})
    both = ValidationArgs(root_dir=str(tmp_path), sources=["other"])
    rows, alone = validator(root, both).rows, validator(root).rows
    assert rows is not None and alone is not None
    assert rows.n_bytes == alone.n_bytes + len(TEXTS[0])


@pytest.mark.parametrize(
    "options, named",
    [
        ({"sources": ["x"]}, "^eval.validation.root_dir"),
        ({"root_dir": "nowhere"}, "^eval.validation.root_dir: .*nowhere"),
        ({"sources": ["x"], "root_dir": "nowhere"}, "nowhere/x"),
    ],
)
def test_missing_folders_are_user_errors(options, named):
    with pytest.raises(UserError, match=named):
        check_validation_sources(ValidationArgs(**options), "eval.validation")
    with pytest.raises(UserError, match="max_steps=0"):
        ValidationArgs(max_steps=0)


def test_the_training_mode_and_the_loops_are_restored(root):
    model = tiny_model("hybrid", 2)
    validator(root)(model, device=CPU, rank=0, world_size=1, loop_count=3)
    assert len(model.inference_layout) == 2
    for mode in (True, False):
        model.train(mode)
        validator(root)(model, device=CPU, rank=0, world_size=1)
        assert model.training is mode
