"""AutoTokenizer gives the ids and the text of the run's tokenizer, for every kind of tokenizer."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unicodedata import normalize

import pytest

from apps.LT2.evaluation.chat import find_chat_template
from apps.LT2.huggingface.tokenizer import save_tokenizer
from lingua.errors import UserError
from lingua.tokenizer import Tokenizer, TokenizerArgs, build_tokenizer
from tests.lingua.test_tokenizer import make_hf, make_sp, make_tiktoken
from tests.lingua.tokenizer_kinds import TEXTS, TOKENIZER_KINDS, byte_level, sentencepiece
from tests.LT2.huggingface.random_text import LOOK_ALIKES, random_text

transformers = pytest.importorskip("transformers")

IDENTITY: dict[str, Any] = dict(
    normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True
)
SYMBOLS = dict(user_defined_symbols=["<sep>", "ab", "<seplong>"], control_symbols=["<ctl>"])
KINDS = TOKENIZER_KINDS | {
    "tiktoken": lambda folder: ("tiktoken", make_tiktoken(folder)),
    "sp-identity": lambda folder: ("sp", make_sp(folder)),
    "sp-char": lambda folder: sentencepiece(folder, model_type="char", vocab_size=100),
    "sp-unigram-bytes": lambda folder: sentencepiece(
        folder, model_type="unigram", vocab_size=400, **IDENTITY
    ),
    "sp-symbols": lambda folder: sentencepiece(
        folder, model_type="bpe", vocab_size=350, pad_id=3, **SYMBOLS, **IDENTITY
    ),
    "sp-unigram-symbols": lambda folder: sentencepiece(
        folder, model_type="unigram", vocab_size=350, **SYMBOLS
    ),
}
WITH_UNKNOWN = ("wordpiece", "metaspace")  # the library drops their unknown token when decoding


@cache
def exported(kind: str) -> tuple[Tokenizer, Any, Tokenizer]:
    """Return our tokenizer, transformers' and ours from the exported folder."""
    with TemporaryDirectory() as name:
        args = TokenizerArgs(*KINDS[kind](Path(name)))
        out = Path(name) / "out"
        out.mkdir()
        save_tokenizer(args, out)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        return build_tokenizer(args.name, args.path), theirs, build_tokenizer("hf", str(out))


def check(kind: str, texts: list[str]) -> None:
    ours, theirs, again = exported(kind)
    add_bos = ours.bos_id >= 0
    for text in texts:
        tokens = ours.encode(text, add_bos, False)
        assert theirs(text)["input_ids"] == tokens, text
        assert again.encode(text, add_bos, False) == tokens, text
        if kind not in WITH_UNKNOWN:
            assert theirs.decode(tokens, skip_special_tokens=True) == ours.decode(tokens), text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_of_random_texts(kind):
    rng = random.Random(kind)
    check(kind, [random_text(rng) for _ in range(100)])


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_of_chosen_texts(kind):
    long = "The list. " * 300 + "a" * 3000 + " " * 300
    check(kind, ["", " ", *TEXTS, *LOOK_ALIKES, "x".join(LOOK_ALIKES), long])


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_the_same(kind):
    ours, theirs, again = exported(kind)
    for role in ("bos", "eos"):
        want = getattr(ours, f"{role}_id")
        assert getattr(theirs, f"{role}_token_id") == (want if want >= 0 else None)
        assert getattr(again, f"{role}_id") == want
    assert theirs.pad_token_id is not None
    assert max(theirs.get_vocab().values()) == again.n_words - 1 == ours.n_words - 1
    assert set(theirs("a b")) == {"input_ids", "attention_mask"}
    batch = theirs(["a", "a b c d"], padding=True)["attention_mask"]
    assert batch[0][0] == 0 and batch[0][-1] == batch[1][0] == 1


@pytest.mark.parametrize("kind", ["sp-bpe", "sp-unigram"])
@pytest.mark.parametrize(
    "text",
    [
        normalize("NFD", "한국어 각가"),
        normalize("NFD", "がぎぐばパヴ"),
        normalize("NFD", "ế ệ ừ ự ữ ạ ả ặ đ ơ"),
        "ﾊﾟﾀﾞ",
        "ﬀ\u0651 ﮔّ ﭏְ שּׁ בְּרֵ מُّ",
        "½\u0338 \u00a0\u0306",
        "a\r\n\r\nb\tc",
        "\u0301\u05b4 a\u05b8\u0301\u05b4",
    ],
)
def test_normalization_of_marks(kind, text):
    check(kind, [text])


def save(tmp_path: Path, args: TokenizerArgs, **options: Any) -> Any:
    out = tmp_path / "out"
    out.mkdir()
    save_tokenizer(args, out, **options)
    return transformers.AutoTokenizer.from_pretrained(out)


def test_add_bos_of_the_run(tmp_path):
    theirs = save(tmp_path, TokenizerArgs("bytes"), add_bos=False)
    assert theirs("a", "b")["input_ids"] == [97, 98]
    assert exported("bytes")[1]("a", "b")["input_ids"] == [256, 97, 256, 98]
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("a<bos>")["input_ids"] == [97, *b"<bos>"]


def test_generation_config(tmp_path):
    make_hf(tmp_path, ("<s>", "</s>", "<pad>"))
    out = tmp_path / "out"
    out.mkdir()
    ids = save_tokenizer(TokenizerArgs("hf", str(tmp_path)), out)
    assert ids == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.GenerationConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)


def test_options_of_the_file_that_change_ids_are_dropped(tmp_path):
    """Padding, truncation, a post-processor, cleaned-up blanks and specials outside the vocab."""
    tk = pytest.importorskip("tokenizers")
    byte_level(
        tmp_path,
        bos_token=None,
        eos_token="</s>",
        clean_up_tokenization_spaces=True,
        mask_token="<mask>",
        unk_token={"content": "<s>"},
        model_max_length=2,
    )
    model = tk.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.enable_truncation(4)
    model.enable_padding(length=50)
    model.post_processor = tk.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    args = TokenizerArgs("hf", str(tmp_path))
    ours, theirs = build_tokenizer("hf", str(tmp_path)), save(tmp_path, args)
    text = "The function , and the list . It is n't empty !"
    tokens = ours.encode(text, False, False)
    assert theirs(text, truncation=True)["input_ids"] == tokens and theirs.decode(tokens) == text
    assert (theirs.bos_token, theirs.eos_token_id) == (None, 1) and len(theirs) == ours.n_words
    assert (theirs.unk_token_id, theirs.mask_token) == (0, None)


def test_an_eos_that_only_the_config_has(tmp_path):
    added = {"500": {"content": "<new>", "special": True}}
    byte_level(tmp_path, eos_token="<new>", added_tokens_decoder=added)
    theirs = save(tmp_path, TokenizerArgs("hf", str(tmp_path)))
    assert theirs.eos_token_id == 500 and theirs.decode([500]) == "<new>"
    assert theirs("<new>")["input_ids"][1:] != [500]


def test_chat_template(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    byte_level(tmp_path, chat_template=template)
    args = TokenizerArgs("hf", str(tmp_path))
    theirs = save(tmp_path, args)
    messages = [{"role": "user", "content": "hi <s>"}, {"role": "assistant", "content": "yes"}]
    want = find_chat_template(args).render(messages, False)
    assert (
        theirs.apply_chat_template(messages, tokenize=False)
        == want
        == "user: hi <s>\nassistant: yes\n"
    )
    ours = build_tokenizer("hf", str(tmp_path))
    assert theirs(want)["input_ids"] == ours.encode(want, True, False)
    text = (tmp_path / "out/chat_template.jinja").read_text()
    save_tokenizer(TokenizerArgs("hf", str(tmp_path / "out")), tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == text


def test_a_tokenizer_without_an_equal_is_refused(tmp_path):
    tk = pytest.importorskip("tokenizers")
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}  # whole words: "</s>" can't be hidden
    model = tk.Tokenizer(tk.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<s>", "</s>", "<unk>"])
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="data.tokenizer.name=hf") as error:
        save_tokenizer(TokenizerArgs("hf", str(tmp_path)), tmp_path)
    assert "\n" not in str(error.value)
    sentencepiece(tmp_path, model_type="word", vocab_size=20)
    with pytest.raises(UserError, match="data.tokenizer.name=sp"):
        save_tokenizer(TokenizerArgs("sp", str(tmp_path)), tmp_path)


def test_files_are_json_that_older_versions_read(tmp_path):
    save_tokenizer(TokenizerArgs("bytes"), tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (content["bos_token"], content["eos_token"]) == ("<bos>", "<eos>")
