"""Properties of every tokenizer, with files that are made here from a few sentences."""

from __future__ import annotations

import base64
import json

import pytest

from lingua.errors import UserError
from lingua.tokenizer import (
    TikTokenTokenizer,
    TokenizerArgs,
    build_tokenizer,
    find_tokenizer_file,
    split_safely,
    starts_from_bytes,
    well_formed,
)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "日本語の文と English words, 1234567 numbers; and (brackets)!",
    "def f(x):\n    return x + 1\n\n\nprint(f(2))  # a comment",
    "The dog and the fox; the fox and the dog: the end.",
]
TEXTS = [
    "",
    "a",
    "aéb",
    "漢字 and 😀 smile 👩‍👩‍👧",
    "  leading, trailing  ",
    "tabs\tand\r\nline\n\n\nbreaks ",
    *SENTENCES,
]


def make_tiktoken(folder):
    pytest.importorskip("tiktoken")
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"qu", "é".encode()]
    # merges must build up from parts that are tokens
    tokens += [b" t", b" th", b"  "]
    lines = [f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return str(folder / "tokenizer.model")


def make_sp(folder):
    spm = pytest.importorskip("sentencepiece")
    text = folder / "corpus.txt"
    text.write_text("\n".join(s.replace("\n", " ") for s in SENTENCES * 20), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return str(folder / "tokenizer.model")


def make_hf(folder, specials=("<|begin_of_text|>", "<|end_of_text|>"), config=None):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(SENTENCES, trainer)
    model.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


MAKERS = {"tiktoken": make_tiktoken, "sp": make_sp, "hf": make_hf}


@pytest.fixture(params=["bytes", *MAKERS])
def tokenizer(request, tmp_path):
    maker = MAKERS.get(request.param)
    return build_tokenizer(request.param, maker(tmp_path) if maker else None)


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, False, False)) == text
    assert tokenizer.decode(tokenizer.encode(text, True, True)) == text


def test_bos_and_eos_are_at_the_ends_and_in_the_vocabulary(tokenizer):
    plain = tokenizer.encode(SENTENCES[0], False, False)
    both = tokenizer.encode(SENTENCES[0], True, True)
    assert both == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode("", True, False) == [tokenizer.bos_id]
    assert tokenizer.bos_id != tokenizer.eos_id
    assert all(0 <= t < tokenizer.n_words for t in both)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(plain)


def test_special_tokens_written_in_a_text_are_text(tokenizer):
    text = "a <|begin_of_text|> b <|end_of_text|> </s><s> c"
    tokens = tokenizer.encode(text, False, False)
    assert tokenizer.decode(tokens) == text
    if not hasattr(tokenizer, "model") or "sentencepiece" not in type(tokenizer.model).__module__:
        assert tokenizer.bos_id not in tokens and tokenizer.eos_id not in tokens


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_are_characters_and_parts_join_to_the_text(tokenizer, text):
    tokens = tokenizer.encode(text, True, True)
    parts, offsets = tokenizer.get_token_offsets(text, tokens)
    assert len(parts) == len(offsets) == len(tokens)
    assert "".join(parts) == text
    assert offsets == sorted(offsets)
    assert offsets[0] == 0 and offsets[-1] == len(text)
    assert all(text.startswith(p, o) for p, o in zip(parts, offsets, strict=True))
    plain = tokenizer.get_token_offsets(text)
    assert plain == (parts[1:-1], offsets[1:-1])


def test_offsets_of_characters_of_many_bytes():
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.get_token_offsets("aéb") == (["a", "", "é", "b"], [0, 1, 1, 2])
    assert starts_from_bytes(["a漢".encode()[:2], "漢".encode()[1:], b"z"]) == [0, 1, 2]


@pytest.mark.parametrize("text", ["é漢😀 end", "👩‍👩‍👧"])
def test_any_prefix_of_a_stream_can_be_decoded(tokenizer, text):
    tokens = tokenizer.encode(text, True, False)
    for n in range(len(tokens) + 1):
        decoded = tokenizer.decode(tokens[:n])
        assert text.startswith(decoded.rstrip("\ufffd"))


def test_a_lone_surrogate_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d b", True, True)) == "a\ufffd b"
    assert well_formed("\ud83d\ude00") == "😀"


def test_tokens_of_known_texts(tmp_path):
    assert build_tokenizer("bytes").encode("aé", True, True) == [256, 97, 195, 169, 257]
    tiktoken = build_tokenizer("tiktoken", make_tiktoken(tmp_path))
    assert tiktoken.encode("the the", False, False) == [257, 258]
    assert tiktoken.n_words == 256 + 8 + 256
    assert (tiktoken.bos_id, tiktoken.eos_id) == (264, 265)


def test_llama3_names_and_numbers(tmp_path):
    """128,000 ranks and 256 special tokens, with the ids of Llama 3."""
    pytest.importorskip("tiktoken")
    ranks = [bytes([b]) for b in range(256)]
    ranks += [i.to_bytes(3, "big") for i in range(128_000 - 256)]
    lines = (f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(ranks))
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    tokenizer = build_tokenizer("tiktoken", str(tmp_path))
    assert isinstance(tokenizer, TikTokenTokenizer)
    assert tokenizer.n_words == 128_256
    special = tokenizer.model.encode_single_token
    assert special("<|begin_of_text|>") == tokenizer.bos_id == 128_000
    assert special("<|end_of_text|>") == tokenizer.eos_id == 128_001
    assert special("<|start_header_id|>") == 128_006
    assert special("<|end_header_id|>") == 128_007
    assert special("<|eot_id|>") == 128_009


@pytest.mark.parametrize(
    "text, want",
    [
        ("I'm 12345 years", ["I", "'m", " ", "123", "45", " years"]),
        ("x = f(a);\n\n  y", ["x", " =", " f", "(a", ");\n\n", " ", " y"]),
        ("end  \n", ["end", "  \n"]),
        ("DON'T stop...", ["DON", "'T", " stop", "..."]),
    ],
)
def test_llama3_split_rule(tmp_path, text, want):
    """With ranks for whole words and bytes only, tokens longer than a byte are whole words."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)}
    long = [p.encode() for p in dict.fromkeys(want) if len(p) > 1]
    encoding = tiktoken.Encoding(
        "words",
        pat_str=TikTokenTokenizer.SPLIT,
        mergeable_ranks={**ranks, **{p: 256 + i for i, p in enumerate(long)}},
        special_tokens={},
    )
    # a word with a rank becomes one token, and no token crosses two words
    assert [
        p.decode() for p in encoding.decode_tokens_bytes(encoding.encode_ordinary(text))
    ] == want


def test_long_texts_are_cut_between_tokens(tmp_path):
    tokenizer = build_tokenizer("tiktoken", make_tiktoken(tmp_path))
    text = " ".join(TEXTS) * 3 + "\n\n  the the\t the" * 5
    want = tokenizer.model.encode_ordinary(text)
    for limit in range(24, 70):  # every 24 characters here have a safe cut
        parts = list(split_safely(text, limit))
        assert "".join(parts) == text
        assert max(map(len, parts)) <= limit
        assert [t for p in parts for t in tokenizer.model.encode_ordinary(p)] == want
    assert list(split_safely("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(split_safely("", 10)) == [""]


def test_hf_takes_a_folder_and_finds_the_usual_names(tmp_path):
    make_hf(tmp_path, specials=("<s>", "</s>", "<pad>"))
    tokenizer = build_tokenizer("hf", str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_hf_prefers_its_config_to_usual_names(tmp_path):
    config = {"bos_token": {"content": "<go>"}, "eos_token": "<halt>"}
    path = make_hf(tmp_path, specials=("<s>", "</s>", "<go>", "<halt>"), config=config)
    tokenizer = build_tokenizer("hf", path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)


def test_hf_without_a_bos_lists_the_names_it_looked_for(tmp_path):
    path = make_hf(tmp_path, specials=("</s>",))
    tokenizer = build_tokenizer("hf", path)
    with pytest.raises(UserError, match=r"data.add_bos=false.*<s>"):
        tokenizer.encode("a", True, False)


def test_hf_padding_and_truncation_of_the_file_are_turned_off(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = make_hf(tmp_path)
    model = tokenizers.Tokenizer.from_file(path)
    model.enable_truncation(4)
    model.enable_padding(length=50)
    model.save(path)
    tokenizer = build_tokenizer("hf", path)
    assert tokenizer.decode(tokenizer.encode(SENTENCES[1], False, False)) == SENTENCES[1]


@pytest.mark.parametrize("name", ["tiktoken", "sp", "hf"])
def test_a_missing_or_wrong_file_names_the_option(tmp_path, name):
    with pytest.raises(UserError, match="data.tokenizer.path is not set"):
        find_tokenizer_file(name, None)
    with pytest.raises(UserError, match="data.tokenizer.path=.*no file .*nothing"):
        build_tokenizer(name, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="data.tokenizer.path=.*no file .*tokenizer"):
        build_tokenizer(name, str(tmp_path))  # a folder without the file
    pytest.importorskip({"sp": "sentencepiece", "hf": "tokenizers"}.get(name, name))
    wrong = tmp_path / "wrong"
    wrong.write_text("not a tokenizer\n")
    with pytest.raises(UserError, match="data.tokenizer.path.*wrong"):
        build_tokenizer(name, str(wrong))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="data.tokenizer.name must be one of bytes, hf, .*'llama'"):
        TokenizerArgs("llama")


def test_a_tokenizer_without_bos_is_refused(tmp_path):
    tokenizer = build_tokenizer("bytes")
    tokenizer.bos_id = -1
    with pytest.raises(UserError, match="data.add_bos=true"):
        tokenizer.encode("a", True, False)
    assert tokenizer.encode("a", False, True) == [97, 257]


def test_missing_bos_and_eos_are_one_error(tmp_path):
    tokenizer = build_tokenizer("hf", make_hf(tmp_path, specials=("<pad>",)))
    with pytest.raises(UserError, match="data.add_bos=false.*data.add_eos=false"):
        tokenizer.encode("a", True, True)
    with pytest.raises(UserError) as caught:
        tokenizer.encode("a", False, True)
    assert "add_bos" not in str(caught.value)


def test_a_missing_package_names_what_to_install(tmp_path, monkeypatch):
    import sys

    (tmp_path / "tokenizer.model").write_text("")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="data.tokenizer.name=sp needs the package sentencepiece"):
        build_tokenizer("sp", str(tmp_path))


def test_an_empty_tiktoken_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(UserError, match="ranks must run from 0"):
        build_tokenizer("tiktoken", str(tmp_path))


def test_a_missing_local_tokenizer_names_the_script_that_writes_it(tmp_path):
    path = tmp_path / "data" / "local" / "tokenizer.json"
    with pytest.raises(UserError, match="setup/prepare_local_data.py"):
        build_tokenizer("hf", str(path))
