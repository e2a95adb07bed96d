"""Write the tokenizer of a run as files that transformers' AutoTokenizer loads.

`save_tokenizer` converts every tokenizer of `lingua.tokenizer` to a tokenizer.json. The ids, the
special tokens and the decoded text are the same. Names of special tokens in a text are text, as in
training (`split_special_tokens`). transformers starts a text with BOS if training did.

    bytes     BPE of the 256 byte values, without merges
    tiktoken  BPE; the merges are all pairs of tokens that join to a token, by rank
    sp        BPE or Unigram, with the model's normalization and byte tokens
    hf        the file itself, with what `HuggingFaceTokenizer` changes
"""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from apps.LT2.evaluation.chat import read_chat_template
from lingua.errors import UserError, import_optional
from lingua.files.atomic import write_atomic
from lingua.tokenizer import (
    CONFIG_NAME,
    SPECIALS_NAME,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TikTokenTokenizer,
    Tokenizer,
    TokenizerArgs,
    build_tokenizer,
    find_tokenizer_file,
    read_added_tokens,
    read_json_object,
)

TOKENIZER_NAME = "tokenizer.json"
GENERATION_NAME = "generation_config.json"
CHAT_NAME = "chat_template.jinja"
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
OTHER_SPECIALS = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
SPACE = "▁"  # a blank in the vocabulary of SentencePiece


def save_tokenizer(
    tokenizer: TokenizerArgs, folder: Path, *, add_bos: bool = True
) -> dict[str, int]:
    """Write the tokenizer's files and generation_config.json into `folder`, which must exist.

    Return bos_token_id, eos_token_id and pad_token_id, as far as they exist.

    Args:
        tokenizer: the tokenizer of the run, with the path where its file is now.
        folder: receives tokenizer.json, tokenizer_config.json, special_tokens_map.json,
            generation_config.json, and chat_template.jinja if the tokenizer has a template.
        add_bos: the run's data.add_bos. Ignored if the vocabulary has no BOS.

    Raises:
        UserError: if tokenizer.json would give other ids or another text than the run's tokenizer.
    """
    ours = build_tokenizer(tokenizer.name, tokenizer.path)
    file = find_tokenizer_file(tokenizer.name, tokenizer.path)
    content = convert_tokenizer(ours, file)
    names = {i: name for name, i in _named_ids(content).items()}
    declared = _declared_tokens(ours, file)
    pad = _find_pad(ours, declared.pop("pad_token", None), names)
    ids = {"bos": ours.bos_id, "eos": ours.eos_id, "pad": pad}
    ids = {role: i if i >= 0 else None for role, i in ids.items()}
    specials = {f"{role}_token": None if i is None else names[i] for role, i in ids.items()}
    specials |= {name: text for name, text in declared.items() if text in names.values()}
    content["post_processor"] = _template(names, ids["bos"] if add_bos else None)
    content["padding"] = content["truncation"] = None
    write_atomic(folder / TOKENIZER_NAME, json.dumps(content, ensure_ascii=False))
    check_same(ours, folder / TOKENIZER_NAME, f"data.tokenizer.name={tokenizer.name}")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # as generation needs
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **specials,
    }
    _write_json(folder / CONFIG_NAME, config)
    _write_json(folder / SPECIALS_NAME, {k: v for k, v in specials.items() if v is not None})
    generation = {f"{role}_token_id": i for role, i in ids.items() if i is not None}
    _write_json(folder / GENERATION_NAME, generation)
    if (template := read_chat_template(tokenizer)) is not None:
        write_atomic(folder / CHAT_NAME, _without_special_names(template[0]))
    return generation


def convert_tokenizer(ours: Tokenizer, file: Path | None) -> dict[str, Any]:
    """Return the content of a tokenizer.json with the ids of `ours`, which was built from `file`.

    Its special tokens are bos, eos and the file's own. It has no post-processor.
    """
    if isinstance(ours, HuggingFaceTokenizer):
        assert file is not None, "an hf tokenizer has a file"
        return _from_hugging_face(ours, file)
    if isinstance(ours, SentencePieceTokenizer):
        return _from_sentencepiece(ours)
    if isinstance(ours, TikTokenTokenizer):
        return _from_tiktoken(ours)
    assert isinstance(ours, ByteTokenizer), type(ours)
    return _byte_level_bpe([bytes([byte]) for byte in range(256)], ["<bos>", "<eos>"], None)


def check_same(ours: Tokenizer, file: Path, option: str) -> None:
    """Raise UserError if the tokenizer.json in `file` differs from `ours` on `sample_texts`."""
    theirs = _tokenizers().Tokenizer.from_file(str(file))
    theirs.encode_special_tokens = True  # split_special_tokens of transformers
    for text in sample_texts(ours, _named_ids(json.loads(theirs.to_str()))):
        want = ours.encode(text, False, False)
        got = theirs.encode(text, add_special_tokens=False).ids
        if want != got:
            raise UserError(
                f"{option}: no tokenizer.json gives the ids of this tokenizer: for the text "
                f"{text[:40]!r} they are {want[:8]}, and {got[:8]} after the conversion; train "
                "with an hf tokenizer to export the model"
            )
        decoded = theirs.decode(got, skip_special_tokens=False)
        if ours.decode(want) != decoded:
            raise UserError(
                f"{option}: no tokenizer.json decodes as this tokenizer does: {want[:8]} are "
                f"{ours.decode(want)[:40]!r}, and {decoded[:40]!r} after the conversion; train "
                "with an hf tokenizer to export the model"
            )


SAMPLES = (
    "",
    " ",
    "  Two blanks  between   words, and at the end  ",
    "The 3rd of 1,234,567 tests isn't over; THEY'LL say: \"x != y\" (100%).",
    "def f(x):\n    return {'a': x**2}\n\n\n\tprint(f(2))  # a comment\r\n\r\n",
    "Zwölf Boxkämpfer, l'été à Œuvre; ЁЖ и Čeština; ελληνικά άέ; Tiếng Việt",
    "日本語の文、 中文字符。 한국어 문장 ไทย हिन्दी עברית العربية",
    "🙂👍🏽👩‍👩‍👧 ∑∞≠ ½ ﬁ Å ①",
    "a\x00b\x01c\x7fd\u200be\ufefff\u2028g\xa0h▁i \ufffd",
    "aaaaaaaaaaaaaaaaa" + " " * 17 + "\n" * 9 + "=" * 33 + "ab" * 20 + "1" * 20,
)


def sample_texts(ours: Tokenizer, names: Iterable[str], n_random: int = 200) -> list[str]:
    """Return texts to compare tokenizers on: fixed ones, names of tokens, and joined tokens."""
    rng = random.Random(0)
    words = [ours.decode([i]) for i in rng.sample(range(ours.n_words), min(ours.n_words, 2000))]
    words = [word for word in words if "\ufffd" not in word] or [""]
    special = [name for name in names if re.fullmatch(r"\W.*\W", name)][:400]
    joined = ["".join(rng.choices(words, k=rng.randint(2, 30))) for _ in range(n_random)]
    return [*SAMPLES, "x".join(special), " ".join(special), *special[:40], *joined]


# ---- conversions


def _from_hugging_face(ours: HuggingFaceTokenizer, file: Path) -> dict[str, Any]:
    content = json.loads(ours.model.to_str())
    vocab, known = content["model"]["vocab"], _named_ids(content)
    declared = {i: name for name, i in read_added_tokens(file).items()}
    for token in {ours.bos_id, ours.eos_id} - {-1, *known.values()}:
        if not isinstance(vocab, dict):
            raise UserError(
                f"data.tokenizer.path={file}: {declared[token]} ({token}) is missing in {file.name}"
            )
        vocab[declared[token]] = token
        content["added_tokens"].append(_special(declared[token], token))
    if content["model"]["type"] == "Unigram":
        _hide_from_text(content, ours.special_ids)
    return content


def _from_tiktoken(ours: TikTokenTokenizer) -> dict[str, Any]:
    decode = ours.model.decode_single_token_bytes
    tokens = [decode(i) for i in range(ours.n_words)]
    specials = [token.decode() for token in tokens[ours.n_ranks :]]
    return _byte_level_bpe(tokens[: ours.n_ranks], specials, ours.SPLIT)


def _byte_level_bpe(
    tokens: list[bytes], specials: Iterable[str], split: str | None
) -> dict[str, Any]:
    """Return byte-level BPE with the ranks of `tokens`; the ids of `specials` follow."""
    tk = _tokenizers()
    as_text = _byte_names()
    names = ["".join(as_text[byte] for byte in token) for token in tokens]
    merges = _find_merges({name: rank for rank, name in enumerate(names)})
    vocab = {name: rank for rank, name in enumerate(names)}
    model = tk.Tokenizer(tk.models.BPE(vocab, merges, ignore_merges=split is not None))
    steps = [] if split is None else [tk.pre_tokenizers.Split(tk.Regex(split), "isolated")]
    steps.append(tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    model.pre_tokenizer = tk.pre_tokenizers.Sequence(steps)
    model.decoder = tk.decoders.ByteLevel()
    model.add_special_tokens(list(specials))
    return json.loads(model.to_str())


def _byte_names() -> list[str]:
    """Return the character of GPT-2's byte-level vocabularies for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    codes = {byte: byte for byte in printable} | {b: 256 + n for n, b in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256)]


def _find_merges(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that join to a token, lowest ranks first."""
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=lambda t: ranks[t]):
        parts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [(a, b) for a, b in parts if a in ranks and b in ranks]
    return merges


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of a piece
UNIGRAM, BPE, CHAR = 1, 2, 4  # types of a model


def _from_sentencepiece(ours: SentencePieceTokenizer) -> dict[str, Any]:
    tk = _tokenizers()
    import_optional("google.protobuf", extra="sentencepiece", needed_by="format=hf")
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(
        ours.model.serialized_model_proto()
    )
    trainer, spec, pieces = proto.trainer_spec, proto.normalizer_spec, proto.pieces
    kind, bytes_too = trainer.model_type, trainer.byte_fallback
    if kind not in (UNIGRAM, BPE, CHAR):
        raise UserError("data.tokenizer.name=sp: a SentencePiece model of words has no equal")
    unknown = next((i for i, p in enumerate(pieces) if p.type == UNKNOWN), None)
    given = [p.piece for p in pieces if p.type == USER_DEFINED]
    if kind == UNIGRAM:
        scores = [(p.piece, p.score) for p in pieces]
        core = tk.models.Unigram(scores, unk_id=unknown, byte_fallback=bytes_too)
    else:
        normal = {p.piece: -p.score for p in pieces if p.type == NORMAL}
        core = tk.models.BPE(
            {p.piece: i for i, p in enumerate(pieces)},
            _find_merges(normal) if kind == BPE else [],
            unk_token=None if unknown is None else pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=bytes_too,
            ignore_merges=bool(given),
        )
    model = tk.Tokenizer(core)
    model.normalizer = tk.normalizers.Sequence(_normalizers(spec))
    if given:
        longest_first = "|".join(map(re.escape, sorted(given, key=len, reverse=True)))
        model.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(longest_first), "isolated")
    steps = [tk.decoders.Replace(SPACE, " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    if unknown is not None:
        steps.insert(0, tk.decoders.Replace(pieces[unknown].piece, trainer.unk_surface))
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(tk.decoders.Strip(" ", 1, 0))
    model.decoder = tk.decoders.Sequence(steps)
    model.add_special_tokens([p.piece for p in pieces if p.type == CONTROL])
    content = json.loads(model.to_str())
    if kind == UNIGRAM or given:  # the others reach a name by merges only
        _hide_from_text(
            content, {i for i, p in enumerate(pieces) if p.type in (UNKNOWN, CONTROL, BYTE)}
        )
    return content


def _normalizers(spec: Any) -> list[Any]:
    """Return the steps of SentencePiece's normalization, in its order."""
    tk = _tokenizers()
    Replace, Regex = tk.normalizers.Replace, tk.Regex
    steps = []
    if spec.precompiled_charsmap:
        steps += _apply_charsmap(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        steps += [Replace(Regex(r"\A +"), ""), Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(tk.normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(Replace(Regex(f"[{SPACE} ]+\\z"), ""))
    return steps


def _apply_charsmap(charsmap: bytes) -> list[Any]:
    """Return steps that apply SentencePiece's rules, such as nmt_nfkc.

    The library's Precompiled loses marks after a replaced character, "\\n" of "\\r\\n", and most
    rules of several characters. So a separator ends each of its clusters, and NFC composes after
    it. Another separator keeps NFC from reordering marks that it never composes. What remains: a
    character with two marks in an order that no rule composes.
    """
    tk = _tokenizers()
    Replace, Regex = tk.normalizers.Replace, tk.Regex
    one, two = "\ufff0", "\ufff1"  # not assigned to characters, and no part of a cluster
    marks = "".join(rf"\x{{{ord(mark):x}}}" for mark in _composing_marks())
    others = rf"[\p{{M}}&&[^{marks}]]"
    joiners = r"[\p{M}\x{200c}\x{200d}\x{ff9e}\x{ff9f}\x{1160}-\x{11ff}\x{e33}\x{eb3}]"
    return [
        Replace(Regex(rf"(?<=\r)(?=\n)|(?<!\A)(?={joiners})"), one),
        tk.normalizers.Precompiled(charsmap),
        Replace(one, ""),
        Replace(Regex(rf"(?<=\p{{M}})(?={others})|(?<={others})(?=\p{{M}})"), two),
        tk.normalizers.NFC(),
        Replace(two, ""),
    ]


@cache
def _composing_marks() -> list[str]:
    """Return the marks that NFC joins with the character before them."""
    chars = map(chr, range(sys.maxunicode))
    parts = (nfd for c in chars if normalize("NFC", nfd := normalize("NFD", c)) == c != nfd)
    return sorted({mark for nfd in parts for mark in nfd[1:] if category(mark)[0] == "M"})


def _hide_from_text(content: dict[str, Any], hidden: Collection[int]) -> None:
    """Change a tokenizer.json so that no text matches the names of the tokens `hidden`.

    A pre-tokenizer cuts each name at a place that no token crosses. Two unknown characters are one
    token, without byte tokens. In a Unigram model, a name without such a place gets a score that
    loses to its characters.
    """
    model = content["model"]
    vocab, cuts, uncut = model["vocab"], set(), []
    names = list(vocab) if isinstance(vocab, dict) else [name for name, _ in vocab]
    tokens = {name for i, name in enumerate(names) if i not in hidden}
    crossed = {name[i : i + 2] for name in tokens for i in range(len(name) - 1)}
    for i in hidden:
        name = names[i]
        for k in range(1, len(name)):
            fused = not model["byte_fallback"] and tokens.isdisjoint(name[k - 1 : k + 1])
            if name[k - 1 : k + 1] not in crossed and not fused:
                cuts.add(f"{re.escape(name[:k])}(?={re.escape(name[k:])})")
                break
        else:
            uncut.append(i)
    if isinstance(vocab, list) and uncut:
        lowest = 20 * min(score for _, score in vocab)
        for i in uncut:
            vocab[i] = [names[i], lowest]
    if cuts:
        split = {"Regex": "|".join(sorted(cuts))}
        step = {"type": "Split", "pattern": split, "behavior": "MergedWithPrevious"}
        steps = [step | {"invert": False}]
        if content["pre_tokenizer"] is not None:
            steps.insert(0, content["pre_tokenizer"])
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


# ---- the other files


def _declared_tokens(ours: Tokenizer, file: Path | None) -> dict[str, str]:
    """Return the texts of pad, unk and others that the folder of an hf tokenizer declares."""
    if not isinstance(ours, HuggingFaceTokenizer) or file is None:
        return {}
    config = read_json_object(file.with_name(CONFIG_NAME))
    given = {name: config.get(name) for name in OTHER_SPECIALS}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _find_pad(ours: Tokenizer, declared: str | None, names: Mapping[int, str]) -> int:
    """Return the id of the declared padding token, else of a usual name, else eos, else bos."""
    ids = {name: i for i, name in names.items()}
    usual = (declared, *PAD_NAMES)
    found = next((ids[name] for name in usual if name in ids), -1)
    return next((i for i in (found, ours.eos_id, ours.bos_id) if i >= 0), -1)


def _template(names: Mapping[int, str], bos: int | None) -> dict[str, Any]:
    """Return the post-processor that adds BOS, or nothing, at the start of a text."""
    first: list[dict[str, Any]] = []
    special_tokens = {}
    if bos is not None:
        name = names[bos]
        first = [{"SpecialToken": {"id": name, "type_id": 0}}]
        special_tokens = {name: {"id": name, "ids": [bos], "tokens": [name]}}
    a, b = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*first, a],
        "pair": [*first, a, *first, b],
        "special_tokens": special_tokens,
    }


def _without_special_names(template: str) -> str:
    """Render bos_token and eos_token as "", as our chat template does: as text they are garbage."""
    names = [name for name in ("bos_token", "eos_token") if name in template]
    first = "".join(f'{{%- set {name} = "" -%}}' for name in names)
    return template if template.startswith(first) else first + template


def _named_ids(content: dict[str, Any]) -> dict[str, int]:
    """Return the ids of all names in the content of a tokenizer.json."""
    vocab = content["model"]["vocab"]
    if not isinstance(vocab, dict):
        vocab = {name: i for i, (name, _) in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in content["added_tokens"]}


def _special(name: str, token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, **flags, "special": True}


def _tokenizers() -> Any:
    return import_optional("tokenizers", extra="", needed_by="format=hf")


def _write_json(file: Path, content: Any) -> None:
    write_atomic(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
