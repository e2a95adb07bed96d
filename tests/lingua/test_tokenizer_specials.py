"""Which tokens are bos and eos: what a tokenizer's files declare, and what they lack."""

from __future__ import annotations

import json
import sys

import pytest

from lingua.errors import UserError
from lingua.tokenizer import build_tokenizer, declared_specials
from tests.lingua.tokenizer_kinds import (
    TOKENIZER_KINDS,
    byte_level,
    hugging_face,
    make_tokenizer,
    sentencepiece,
)

CONFIG = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"
VOCAB = ("<s>", "</s>", "<pad>", "<|im_end|>")  # ids 0 to 3


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(folder, VOCAB)
    return (folder / "tokenizer.json").read_text()


def build(folder, tokenizer_json, **files):
    (folder / "tokenizer.json").write_text(tokenizer_json)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return build_tokenizer("hf", str(folder))


def added(*contents, first=0):
    return {str(first + i): {"content": c, "special": True} for i, c in enumerate(contents)}


@pytest.mark.parametrize(
    "config, want",
    [
        ({}, (0, 1)),
        ({"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<pad>"}, (-1, 3)),  # Qwen
        ({"bos_token": "<s>", "eos_token": None, "add_bos_token": True}, (0, -1)),
        ({"bos_token": None, "eos_token": None, "pad_token": None}, (-1, -1)),
        ({"bos_token": "", "eos_token": {"content": ""}}, (-1, -1)),
        ({"bos_token": "</s>", "eos_token": "</s>"}, (1, 1)),  # GPT-2
        ({"bos_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": False}}, (2, 1)),
        ({"eos_token": "<halt>"}, (0, -1)),  # not in the vocabulary
        ({"bos_token_id": 2, "eos_token_id": None}, (2, -1)),
        ({"bos_token": None, "bos_token_id": 2, "eos_token": "</s>", "eos_token_id": 3}, (-1, 1)),
        ({"bos_token_id": 10_000}, (-1, 1)),
        ({"eos_token": "<new>", "added_tokens_decoder": added("<new>", first=500)}, (0, 500)),
        ({"eos_token": "</s>", "added_tokens_decoder": None}, (0, 1)),
    ],
)
def test_bos_and_eos_are_the_declared_ones(config, want, tokenizer_json, tmp_path):
    tokenizer = build(tmp_path, tokenizer_json, tokenizer_config=config)
    assert (tokenizer.bos_id, tokenizer.eos_id) == want
    assert tokenizer.n_words > max(want)
    has_bos, has_eos = (token >= 0 for token in want)
    tokens = tokenizer.encode("a <s> b </s>", has_bos, has_eos)
    assert tokenizer.decode(tokens) == "a <s> b </s>"
    for role, add_bos, add_eos in (("bos", True, False), ("eos", False, True)):
        if not {"bos": has_bos, "eos": has_eos}[role]:
            with pytest.raises(UserError, match=f"data.add_{role}=true.*data.add_{role}=false"):
                tokenizer.encode("a", add_bos, add_eos)


def word_level(folder):
    tk = pytest.importorskip("tokenizers")
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    tokenizer = tk.Tokenizer(tk.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return hugging_face(folder, tokenizer)


@pytest.mark.parametrize("make", [TOKENIZER_KINDS["metaspace"], word_level])
@pytest.mark.parametrize("text", ["a </s> a", "</s>", "a <pad> a<s>a</s>a"])
def test_a_vocabulary_with_the_names_of_special_tokens(make, text, tmp_path):
    tokenizer = build_tokenizer(*make(tmp_path))
    specials = {token.content for token in tokenizer.model.get_added_tokens_decoder().values()}
    tokens = tokenizer.encode(text, False, True)
    names = [tokenizer.model.id_to_token(token) for token in tokens]
    assert names[-1] == "</s>" and specials.intersection(names[:-1]) <= {"<unk>"}
    assert "".join(tokenizer.get_token_offsets(text, tokens)[0]) == text


def test_a_declared_token_that_is_missing_is_logged_once(tokenizer_json, tmp_path, caplog):
    for _ in range(2):
        build(tmp_path, tokenizer_json, tokenizer_config={"eos_token": "<halt>"})
    assert caplog.text.count("<halt>") == 1


def test_older_folders_declare_them_in_special_tokens_map(tokenizer_json, tmp_path):
    specials = {"bos_token": {"content": "<pad>"}, "eos_token": "<|im_end|>"}
    tokenizer = build(tmp_path, tokenizer_json, special_tokens_map=specials)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    tokenizer = build(tmp_path, tokenizer_json, tokenizer_config={"bos_token": None})
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, 3)
    declared = declared_specials("hf", tmp_path / "tokenizer.json")
    assert declared == {"eos": "<|im_end|>"}, "token files of older versions have no nulls"


@pytest.mark.parametrize(
    "file, content, named",
    [
        (CONFIG, ["x"], "list"),
        (CONFIG, "x", "str"),
        (CONFIG, None, "NoneType"),
        (SPECIALS, [], "list"),
        (CONFIG, {"bos_token": ["<s>"]}, "bos_token"),
        (CONFIG, {"eos_token": 1}, "eos_token"),
        (CONFIG, {"eos_token": False}, "eos_token"),
        (CONFIG, {"eos_token": {"text": "</s>"}}, "eos_token"),
        (CONFIG, {"eos_token_id": [1, 3]}, "eos_token_id"),
        (SPECIALS, {"bos_token": {"content": 3}}, "bos_token"),
        (CONFIG, {"eos_token": "</s>", "added_tokens_decoder": [1]}, "added_tokens_decoder"),
    ],
)
def test_files_of_another_form_are_named(file, content, named, tokenizer_json, tmp_path):
    with pytest.raises(UserError, match=f"data.tokenizer.path: .*{file}.*{named}") as error:
        build(tmp_path, tokenizer_json, **{file.removesuffix(".json"): content})
    assert "\n" not in str(error.value)


def test_a_bos_that_is_not_marked_as_special_is_text_in_a_document(tokenizer_json, tmp_path):
    ordinary = json.loads(tokenizer_json)
    for token in ordinary["added_tokens"]:
        token["special"] = False
    tokenizer = build(tmp_path, json.dumps(ordinary))
    text = "a <s> b </s>"
    tokens = tokenizer.encode(text, False, False)
    assert not {0, 1} & set(tokens) and tokenizer.decode(tokens) == text
    assert "".join(tokenizer.get_token_offsets(text)[0]) == text


def test_ids_without_a_token_are_gaps(tokenizer_json, tmp_path):
    with_gap = json.loads(tokenizer_json)
    vocab = with_gap["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] = 323
    tokenizer = build(tmp_path, json.dumps(with_gap))
    assert tokenizer.n_words == 324 and list(tokenizer.gaps) == [319, 320, 321, 322]
    assert tokenizer.decode([320, 323, 5000]) == tokenizer.decode([323]) != ""


# ---- every kind of tokenizer


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("text", ["The function returns", "  a (b)\n\n  c  ", "é 東京 🙂", ""])
def test_offsets_join_to_the_text(kind, text):
    tokenizer = make_tokenizer(kind)
    tokens = tokenizer.encode(text, False, tokenizer.eos_id >= 0)
    parts, offsets = tokenizer.get_token_offsets(text, tokens)
    assert "".join(parts) == text or not tokens[:-1]  # wordpiece has no token for blanks
    assert offsets == sorted(offsets) and len(parts) == len(tokens)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_a_blank_belongs_to_the_word_after_it(kind):
    parts, _ = make_tokenizer(kind).get_token_offsets("The the")
    first_word = "The " if kind == "wordpiece" else "The"  # it drops blanks
    joined = [sum(map(len, parts[:n])) for n in range(len(parts) + 1)]
    assert len(first_word) in joined


@pytest.mark.parametrize("kind", ["sp-bpe", "sp-unigram"])
def test_sentencepiece_needs_no_protobuf(kind, monkeypatch):
    monkeypatch.setattr("sentencepiece._protobuf_loaded", False, raising=False)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    parts, _ = make_tokenizer(kind).get_token_offsets("  é The")
    assert "".join(parts) == "  é The"


def test_invalid_bytes_leave_the_characters_next_to_them():
    tokenizer = make_tokenizer("byte-fallback")
    whole = [3 + byte for byte in "é東".encode()]
    assert [tokenizer.decode(whole[:n]) for n in (2, 3, 5)] == ["é", "é\ufffd", "é東"]
    assert tokenizer.decode([3 + 0xFF, *whole, 3 + 0xE6]) == "\ufffdé東\ufffd"


def test_a_sentencepiece_model_may_lack_both(tmp_path):
    sentencepiece(tmp_path, model_type="bpe", vocab_size=100, bos_id=-1, eos_id=-1)
    tokenizer = build_tokenizer("sp", str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, -1)
    assert tokenizer.decode(tokenizer.encode("The list", False, False)) == "The list"
    with pytest.raises(UserError, match="data.add_eos=false"):
        tokenizer.encode("a", False, True)
